"""Writing one step's keys and values into the paged KV cache."""

from __future__ import annotations

from torch import Tensor

from tercet.ops.registry import operation


@operation("write_kv")
def write_kv(k_TKD: Tensor, v_TKD: Tensor, kv_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Store keys and values at their slots, in place.

    Non-finite values are stored as 0: a row that overflowed has no valid output, and blocks, above all the
    null block, are read by others under a mask, where 0 * NaN would spread it.

    Args:
        k_TKD, v_TKD: [num_tokens, num_kv_heads, head_dim], on the cache's device.
        kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim].
        slot_mapping_T: [num_tokens] int64, block * block_size + offset. Padding and frozen rows name a slot
            of block 0, the null block, where it does not matter which of several writers wins.

    Raises:
        ValueError: head count or head_dim differs from the cache's.

    Source: PagedAttention, Kwon et al. 2023, section 4.
    """
    if k_TKD.shape[1:] != kv_cache.shape[3:] or v_TKD.shape[1:] != kv_cache.shape[3:]:
        raise ValueError(
            f"keys {tuple(k_TKD.shape)} and values {tuple(v_TKD.shape)} do not fit "
            f"the cache {tuple(kv_cache.shape)}"
        )
    k_slots, v_slots = kv_cache.flatten(1, 2).unbind(0)
    k_slots.index_copy_(0, slot_mapping_T, _finite(k_TKD).to(kv_cache.dtype))
    v_slots.index_copy_(0, slot_mapping_T, _finite(v_TKD).to(kv_cache.dtype))


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
