"""Launches Triton's paged attention: one launch (two where the context is split) for the decodes of a step, one
for all its chunks. Nothing waits for the device: grids come from what the host knows.

Decode reads each key and value once for all the query heads that share them. Where rows and KV heads are too few
to fill the device, each row's context is cut into splits, which a second kernel combines (Flash-Decoding, Dao et
al. 2023). Prefill is FlashAttention-2 (Dao 2023) over block tables, tiles packed with the heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops.attention import AttentionMetadata
from tercet.ops.kernels_attention import combine_kernel, decode_kernel, prefill_kernel
from tercet.ops.triton_support import next_power_of_2, num_processors

_PROGRAMS_PER_PROCESSOR = 4  # decode splits contexts until there are about so many
_PADDED_SPLITS = (8, 32, 128)  # the combining kernel is compiled for these


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a kernel's tiles: M lines of queries by N positions, and how Triton runs it."""

    m: int
    n: int
    num_warps: int
    num_stages: int


def decode_tiles(head_dim: int, group: int, dtype: torch.dtype) -> Tiles:
    """Tiles of decode by head size, query heads of a KV head, and dtype."""
    m = max(16, next_power_of_2(group))
    if dtype == torch.float32:
        return Tiles(m, 32 if head_dim <= 128 else 16, 4, 2)
    return Tiles(m, 64 if head_dim <= 128 else 32, 4, 3)


def prefill_tiles(head_dim: int, group: int, dtype: torch.dtype, max_query_len: int) -> Tiles:
    """Tiles of prefill by the same, and the longest chunk of the step."""
    least = max(16, next_power_of_2(group))
    if dtype == torch.float32:
        return Tiles(max(least, 32), 32 if head_dim <= 128 else 16, 4, 2)
    if head_dim > 128:
        return Tiles(max(least, 64), 32, 4, 2)
    if max_query_len * group <= 64:
        return Tiles(max(least, 64), 64, 4, 3)
    return Tiles(max(least, 128), 64, 8, 3)


def num_splits(lines: int, longest: int, tile: int, processors: int) -> int:
    """Parts to cut each context into.

    Args:
        lines: decode rows times KV heads.
        longest: upper bound of the positions that a row sees.
        tile: positions in a tile; a split has at least one.
    """
    wanted = processors * _PROGRAMS_PER_PROCESSOR // max(1, lines)
    return max(1, min(wanted, -(-longest // tile), _PADDED_SPLITS[-1]))


def paged_attention(
    q_THD: Tensor,
    kv_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """As `ops.paged_attention`, for float16, bfloat16 and float32 queries."""
    head_dim = q_THD.shape[2]
    if q_THD.stride(2) != 1 or q_THD.stride(1) != head_dim:
        q_THD = q_THD.contiguous()
    if not kv_cache.is_contiguous():
        raise ValueError(f"the cache {tuple(kv_cache.shape)} must be contiguous")
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    shared = _Call(scale, sliding_window or 0, soft_cap)
    if meta.num_decodes:
        _decode(out_THD, q_THD, kv_cache, meta, shared)
    if meta.chunk_query_lens:
        _prefill(out_THD, q_THD, kv_cache, meta, shared)
    return out_THD


@dataclass(frozen=True, slots=True)
class _Call:
    scale: float
    window: int  # 0 for none
    soft_cap: float | None


def _decode(out: Tensor, q: Tensor, kv_cache: Tensor, meta: AttentionMetadata, call: _Call) -> None:
    num_heads, head_dim = q.shape[1:]
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    tiles = decode_tiles(head_dim, group, q.dtype)
    table = meta.block_table_BN
    max_context = min(-(-meta.max_seq_len // block_size), table.shape[1]) * block_size
    longest = min(max_context, call.window + tiles.n) if call.window else max_context
    lines = meta.num_decodes * num_kv_heads
    splits = num_splits(lines, longest, tiles.n, num_processors(q.device))
    parts = out
    if splits > 1:  # the splits' results, and after them their weights
        count = meta.num_decodes * num_heads * splits * (head_dim + 1)
        parts = torch.empty(count, dtype=torch.float32, device=q.device)
    padded_dim = max(16, next_power_of_2(head_dim))
    decode_kernel[(lines, splits)](
        out,
        parts,
        q,
        kv_cache,
        kv_cache.stride(0),
        table,
        meta.seq_lens_B,
        q.stride(0),
        table.stride(0),
        max_context,
        splits,
        call.scale,
        call.soft_cap or 0.0,
        K=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=call.window,
        SOFT_CAP=call.soft_cap is not None,
        SPLIT=splits > 1,
        M=tiles.m,
        N=tiles.n,
        D_PAD=padded_dim,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        combine_kernel[(meta.num_decodes * num_heads,)](
            out,
            parts,
            meta.seq_lens_B,
            max_context,
            splits,
            H=num_heads,
            D=head_dim,
            WINDOW=call.window,
            N=tiles.n,
            S=next(size for size in _PADDED_SPLITS if size >= splits),
            D_PAD=padded_dim,
            num_warps=4,
        )


def _prefill(out: Tensor, q: Tensor, kv_cache: Tensor, meta: AttentionMetadata, call: _Call) -> None:
    num_heads, head_dim = q.shape[1:]
    _, _, block_size, num_kv_heads, _ = kv_cache.shape
    group = num_heads // num_kv_heads
    tiles = prefill_tiles(head_dim, group, q.dtype, meta.max_query_len)
    num_chunks = len(meta.chunk_query_lens)
    # The kernel finds its chunk from the first tokens alone; a few programs find nothing to do.
    num_tiles = sum(meta.chunk_query_lens) // (tiles.m // group) + num_chunks
    prefill_kernel[(num_tiles * num_kv_heads,)](
        out,
        q,
        kv_cache,
        kv_cache.stride(0),
        meta.block_table_BN,
        meta.seq_lens_B,
        meta.query_start_B1,
        q.stride(0),
        meta.block_table_BN.stride(0),
        num_chunks,
        meta.num_decodes,
        call.scale,
        call.soft_cap or 0.0,
        K=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=call.window,
        SOFT_CAP=call.soft_cap is not None,
        M=tiles.m,
        N=tiles.n,
        D_PAD=max(16, next_power_of_2(head_dim)),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
