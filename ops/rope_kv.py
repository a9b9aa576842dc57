"""From a layer's projected queries, keys and values to what attention reads, as one operation."""

from __future__ import annotations

from torch import Tensor

from tercet.ops.kv_write import write_kv
from tercet.ops.norm import rms_norm
from tercet.ops.registry import operation
from tercet.ops.rotary import apply_rotary
from tercet.ops.triton_support import TRITON, on_cuda


@operation("rope_and_write_kv")
def rope_and_write_kv(
    qkv_THD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    qk_norm: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Norm queries and keys where the model does, rotate them, store keys and values at their slots.

    The same as `rms_norm`, `apply_rotary` and `write_kv` one after another; a kernel may round less often.

    Args:
        qkv_THD: [T, H + 2 K, D]: queries, keys and values of each token side by side.
        cos_TR, sin_TR: as `apply_rotary`.
        kv_cache, slot_mapping_T, k_scale, v_scale: as `write_kv`; the cache's K tells the queries from the rest.
        qk_norm: weights [D] of the norms of queries and keys, if the model has them.
        eps, weight_offset: as `rms_norm`.

    Returns:
        Queries [T, H, D], a new tensor.

    Raises:
        ValueError: the heads do not fit the cache's, or the scales its dtype.
    """
    num_kv_heads = kv_cache.shape[3]
    num_heads = qkv_THD.shape[1] - 2 * num_kv_heads
    if num_heads < 1:
        raise ValueError(f"{qkv_THD.shape[1]} heads do not fit the cache {tuple(kv_cache.shape)}")
    v_TKD = qkv_THD[:, num_heads + num_kv_heads :]
    if qk_norm is None:  # queries and keys lie side by side: rotated as one
        qk_THD = apply_rotary(qkv_THD[:, :-num_kv_heads], cos_TR, sin_TR)
        q_THD, k_TKD = qk_THD[:, :num_heads], qk_THD[:, num_heads:]
    else:
        q_weight_D, k_weight_D = qk_norm
        q_THD = rms_norm(qkv_THD[:, :num_heads], q_weight_D, eps, weight_offset)
        k_TKD = rms_norm(qkv_THD[:, num_heads:-num_kv_heads], k_weight_D, eps, weight_offset)
        q_THD, k_TKD = apply_rotary(q_THD, cos_TR, sin_TR), apply_rotary(k_TKD, cos_TR, sin_TR)
    write_kv(k_TKD, v_TKD, kv_cache, slot_mapping_T, k_scale=k_scale, v_scale=v_scale)
    return q_THD


rope_and_write_kv.kernel(TRITON, "tercet.ops.triton_rows", supports=on_cuda)
