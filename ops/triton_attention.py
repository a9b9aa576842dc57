"""Launches Triton's paged attention: once for the decodes of a step and once for all its chunks, or once for both
where results must not depend on the batch. Nothing waits for the device: grids come from bounds that the host
knows, and what a program does from lengths and counts on the device, so launches can be captured in a CUDA graph.

Each key and value is read once for all the query heads that share them. Contexts are cut into splits where rows
and KV heads are too few to fill the device (Flash-Decoding, Dao et al. 2023), and so are those of short chunks.
Otherwise chunks are FlashAttention-2 (Dao 2023) over block tables, tiles packed with the heads of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops import kernels_attention
from tercet.ops.attention import AttentionMetadata
from tercet.ops.invariance import is_batch_invariant
from tercet.ops.kernels_attention import ALL, CHUNKS, DECODES
from tercet.ops.kv_write import check_kv_scales
from tercet.ops.launch import Kernel
from tercet.ops.triton_support import next_power_of_2, num_processors, programmatic_launch

_attention_kernel = Kernel(kernels_attention.attention_kernel)

_PADDED_ROWS = (
    1,
    32,
    256,
    2048,
)  # the kernel is compiled for these numbers of sequences, and powers of two above
_COMBINED_ELEMENTS = 2048  # of the lines that are combined at a time
_INT32_ELEMENTS = 1 << 31
_MANY_ROWS = 16  # from here on a step has work enough without cutting contexts finely


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shape of a kernel's tiles and how Triton runs it.

    Attributes:
        m, n: lines of queries (tokens times query heads of a KV head) by positions.
        num_warps, num_stages: as Triton has them.
        per_processor: contexts are split until there are about so many programs for each multiprocessor.
        least_split: tiles of a split, at least.
        segment: tiles that are summed before they join the rest, 0 for all: a fixed number fixes the order of
            every sum, whatever the batch.
        max_registers: of a thread, where the compiler would take so many that one program fills a multiprocessor.
    """

    m: int
    n: int
    num_warps: int
    num_stages: int
    per_processor: int
    least_split: int
    segment: int = 0
    max_registers: int | None = None


def decode_tiles(
    head_dim: int, group: int, dtype: torch.dtype, cache_dtype: torch.dtype, num_rows: int
) -> Tiles:
    """Tiles of decode by head size, query heads of a KV head, dtypes, and the most rows of the step.

    Measured by `benchmarks/gpu/tune_attention.py` for heads of 128; see `benchmarks/results`.
    """
    m = max(16, next_power_of_2(group))
    if dtype == torch.float32:
        return Tiles(m, 32 if head_dim <= 128 else 16, 4, 2, 4, 1)
    n = 64 if head_dim <= 128 else 32
    if cache_dtype.itemsize == 1 and head_dim <= 128:
        return Tiles(m, n, 4, 5, 2, 1)
    if num_rows < _MANY_ROWS:
        return Tiles(m, n, 4, 3, 2, 1)
    return Tiles(m, n, 4, 3, 4, 4)


def prefill_tiles(head_dim: int, group: int, dtype: torch.dtype, max_query_len: int) -> Tiles:
    """Tiles of prefill by the same, and the longest chunk of the step."""
    least = max(16, next_power_of_2(group))
    if dtype == torch.float32:
        return Tiles(max(least, 32), 32 if head_dim <= 128 else 16, 4, 2, 2, 4)
    if head_dim > 128:
        return Tiles(max(least, 64), 32, 4, 2, 2, 4)
    if max_query_len <= 1024:
        return Tiles(max(least, 64), 64, 4, 3, 2, 4)
    return Tiles(max(least, 128), 64, 8, 3, 2, 4, max_registers=128)


def invariant_tiles(head_dim: int, group: int, dtype: torch.dtype) -> Tiles:
    """Tiles of every launch where results must not depend on the batch: nothing about a batch chooses them."""
    least = next_power_of_2(group)
    if dtype == torch.float32:
        return Tiles(max(32, least), 16, 4, 2, 4, 1, segment=32)
    if head_dim > 128:
        return Tiles(max(64, least), 32, 8, 2, 4, 1, segment=16)
    return Tiles(max(64, least), 64, 4, 3, 4, 1, segment=8)


def paged_attention(
    q_THD: Tensor,
    kv_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    decode: Tiles | None = None,
    prefill: Tiles | None = None,
) -> Tensor:
    """As `ops.paged_attention`, for float16, bfloat16 and float32 queries.

    Launches of one device share the counters that tell which split is the last, so they must follow one another:
    use one stream at a time. Call once outside a capture before capturing: the counters are made then.

    Args:
        decode, prefill: tiles in place of the tables', to measure them.

    Raises:
        ValueError: the cache is not contiguous, or a scale is not positive, or k_scale and v_scale do not fit
            the cache's dtype.
    """
    head_dim = q_THD.shape[2]
    if q_THD.stride(2) != 1 or q_THD.stride(1) != head_dim:
        q_THD = q_THD.contiguous()
    if not kv_cache.is_contiguous():
        raise ValueError(f"the cache {tuple(kv_cache.shape)} must be contiguous")
    if scale <= 0:
        raise ValueError(f"scale {scale} must be positive")
    check_kv_scales(kv_cache.dtype, k_scale, v_scale)
    group, dtype = q_THD.shape[1] // kv_cache.shape[3], q_THD.dtype
    out_THD = torch.empty(q_THD.shape, dtype=dtype, device=q_THD.device)
    call = _Call(out_THD, q_THD, kv_cache, meta, scale * k_scale, v_scale, sliding_window or 0, soft_cap)
    num_decodes, num_chunks = meta.num_decodes, meta.chunks_bound
    chunk_tokens = meta.chunk_tokens_bound
    if is_batch_invariant():
        tiles = invariant_tiles(head_dim, group, dtype)
        _launch(call, tiles, ALL.value, num_decodes + num_chunks, num_decodes + chunk_tokens)
        return out_THD
    if num_decodes:
        tiles = decode or decode_tiles(head_dim, group, dtype, kv_cache.dtype, num_decodes)
        _launch(call, tiles, DECODES.value, num_decodes, num_decodes)
    if num_chunks:
        tiles = prefill or prefill_tiles(head_dim, group, dtype, meta.max_query_len)
        _launch(call, tiles, CHUNKS.value, num_chunks, chunk_tokens)
    return out_THD


@dataclass(frozen=True, slots=True)
class _Call:
    out: Tensor
    q: Tensor
    kv_cache: Tensor
    meta: AttentionMetadata
    scale: float
    v_scale: float
    window: int  # 0 for none
    soft_cap: float | None


def _launch(call: _Call, tiles: Tiles, rows: int, num_rows: int, num_tokens: int) -> None:
    """Start the kernel for at most so many sequences with at most so many tokens together."""
    meta, q = call.meta, call.q
    num_heads, head_dim = q.shape[1:]
    _, _, block_size, num_kv_heads, _ = call.kv_cache.shape
    group = num_heads // num_kv_heads
    is_decode = rows == DECODES.value
    table = meta.block_table_BN
    max_context = table.shape[1] * block_size
    if is_decode:
        max_context = min(max_context, -(-meta.max_seq_len // block_size) * block_size)
    programs = num_processors(q.device) * tiles.per_processor
    lines = group if is_decode else tiles.m
    padded_dim = max(16, next_power_of_2(head_dim))
    q_tiles = num_rows if is_decode else num_rows + num_tokens // (tiles.m // group)
    grid = _grid(tiles, q_tiles * num_kv_heads, programs, max_context)
    splits = grid > q_tiles * num_kv_heads or tiles.segment
    num_parts = 2 * programs * lines * (head_dim + 2) if splits else 1
    launch = programmatic_launch(q.device, q.shape[0])
    _attention_kernel[(grid,)](
        call.out,
        torch.empty(num_parts, dtype=torch.float32, device=q.device),
        _arrivals(q.device, 2 * programs),
        q,
        call.kv_cache,
        call.kv_cache.stride(0),
        table,
        meta.seq_lens_B,
        meta.query_start_B1,
        meta.seq_lens_B if meta.counts is None else meta.counts,
        meta.num_decodes,
        meta.chunks_bound,
        q.stride(0),
        table.stride(0),
        max_context,
        programs,
        call.scale,
        call.soft_cap or 0.0,
        call.v_scale,
        K=num_kv_heads,
        G=group,
        D=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=call.window,
        SOFT_CAP=call.soft_cap is not None,
        ROWS=rows,
        COUNTED=meta.counts is not None,
        R_PAD=padded_rows(num_rows),
        M=tiles.m,
        N=tiles.n,
        D_PAD=padded_dim,
        LEAST_SPLIT=tiles.least_split,
        SEGMENT=tiles.segment,
        LINES=lines,
        COMBINED_LINES=min(next_power_of_2(lines), max(1, _COMBINED_ELEMENTS // padded_dim)),
        WIDE=call.kv_cache.numel() >= _INT32_ELEMENTS,
        PDL=bool(launch),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.max_registers,
        **launch,
    )


def _grid(tiles: Tiles, unsplit: int, programs: int, max_context: int) -> int:
    """Programs that suffice for any lengths up to max_context.

    Args:
        unsplit: tiles of queries times KV heads.
        programs: splits are made as if there were to be so many in all.
    """
    if tiles.segment:  # all segments where they fit, else none
        return max(unsplit, 2 * programs)
    # Rounding up gives each tile of queries one split more than its share of the work at most.
    splits = -(-max_context // (tiles.n * tiles.least_split))
    return min(unsplit + programs, unsplit * splits)


def padded_rows(num_rows: int) -> int:
    """Sequences that the kernel is compiled for."""
    return next((size for size in _PADDED_ROWS if size >= num_rows), next_power_of_2(num_rows))


_counters: dict[torch.device, Tensor] = {}


def _arrivals(device: torch.device, size: int) -> Tensor:
    """Counters that are zero, and that each launch leaves at zero."""
    kept = _counters.get(device)
    if kept is not None and kept.shape[0] >= size:
        return kept
    made = torch.zeros(size, dtype=torch.int32, device=device)
    if not _is_capturing(device):  # what is made in a capture is zero only where its graph runs
        _counters[device] = made
    return made


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
