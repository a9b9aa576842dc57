"""Writing one step's keys and values into the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.ops.registry import operation


@operation("write_kv")
def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    kv_cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Store keys and values at their slots, in place.

    Non-finite values are stored as 0: a row that overflowed has no valid output, and blocks, above all the
    null block, are read by others under a mask, where 0 * NaN would spread it.

    Args:
        k_TKD, v_TKD: [num_tokens, num_kv_heads, head_dim], on the cache's device.
        kv_cache: [2, num_blocks, block_size, num_kv_heads, head_dim]. Where it is float8_e4m3fn, what exceeds
            its range is stored as its largest value.
        slot_mapping_T: [num_tokens] int64, block * block_size + offset. Padding and frozen rows name a slot
            of block 0, the null block, where it does not matter which of several writers wins.
        k_scale, v_scale: divisors of keys and values in a float8_e4m3fn cache; 1 in others.

    Raises:
        ValueError: head count or head_dim differs from the cache's, or the scales do not fit its dtype.

    Source: PagedAttention, Kwon et al. 2023, section 4.
    """
    if k_TKD.shape[1:] != kv_cache.shape[3:] or v_TKD.shape[1:] != kv_cache.shape[3:]:
        raise ValueError(
            f"keys {tuple(k_TKD.shape)} and values {tuple(v_TKD.shape)} do not fit "
            f"the cache {tuple(kv_cache.shape)}"
        )
    check_kv_scales(kv_cache.dtype, k_scale, v_scale)
    k_slots, v_slots = _bits(kv_cache).flatten(1, 2).unbind(0)
    k_slots.index_copy_(0, slot_mapping_T, _bits(_stored(k_TKD, kv_cache.dtype, k_scale)))
    v_slots.index_copy_(0, slot_mapping_T, _bits(_stored(v_TKD, kv_cache.dtype, v_scale)))


def check_kv_scales(dtype: torch.dtype, k_scale: float, v_scale: float) -> None:
    """Scales belong to a float8_e4m3fn cache and are positive.

    Raises:
        ValueError: otherwise.
    """
    if dtype == torch.float8_e4m3fn:
        if k_scale <= 0 or v_scale <= 0:
            raise ValueError(f"k_scale {k_scale} and v_scale {v_scale} must be positive")
    elif (k_scale, v_scale) != (1.0, 1.0):
        raise ValueError(f"k_scale {k_scale} and v_scale {v_scale} must be 1 for a cache of {dtype}")


def _stored(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    finite = x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        finite = (finite.float() / scale).clamp(-largest, largest)
    return finite.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """float8 as bytes: not every indexing operation knows it."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
