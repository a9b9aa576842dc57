"""Attention over the paged KV cache.

Owns the metadata that attention needs and the attention itself; who filled the tables is not its business.
Dimensions: T tokens of a step, B sequences, N blocks of a sequence, L positions, H query heads, K KV heads,
G = H / K query heads that share one KV head, D head size.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.ops.kv_write import check_kv_scales
from tercet.ops.registry import operation
from tercet.ops.triton_support import TRITON, on_cuda

# The reference gathers the keys and values of a batch before it multiplies; larger batches go in slices,
# so that this, and not the batch, bounds the memory.
GATHER_BYTES_MAX = 1 << 29


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the tokens of one step stand in their sequences and in the cache.

    The step's tokens are the decodes, one token each, and after them the chunks, one after another.

    Attributes:
        num_decodes: how many of the first tokens (and sequences) are decodes.
        block_table_BN: int32, block of each sequence's i-th block_size positions. Entries beyond a sequence
            must still be valid block ids (0, the null block, by custom).
        seq_lens_B: int32, context length including this step's tokens. A frozen or padding decode row may
            hold anything: its output is unspecified but does not touch other rows.
        query_start_B1: int32 [B + 1], first token of each sequence.
        slot_mapping_T: int64, block * block_size + offset where each token's keys and values go; padding and
            frozen rows write into block 0.
        max_query_len, max_seq_len: upper bounds known to the host; max_seq_len bounds the decodes.
        chunk_query_lens, chunk_seq_lens: the same lengths for the chunks, on the host. Empty with counts.
        counts: int32 [2] on the device, for steps whose launches are captured once and replayed: how many decodes
            and chunks there really are. Host numbers are then upper bounds. Sequences and tokens still lie close:
            after the decodes that there are come the chunks. What tables hold beyond them is not read, and the
            output of tokens beyond them is unspecified (it may be NaN) and touches no other row.
        num_chunks, num_chunk_tokens: with counts, the most chunks, and the most tokens in them together.
        memo: what the layers of one step share, such as masks; kept by implementations. A metadata object
            therefore describes one step: make a new one when the tensors in it change.
    """

    num_decodes: int
    block_table_BN: Tensor
    seq_lens_B: Tensor
    query_start_B1: Tensor
    slot_mapping_T: Tensor
    max_query_len: int
    max_seq_len: int
    chunk_query_lens: tuple[int, ...] = ()
    chunk_seq_lens: tuple[int, ...] = ()
    counts: Tensor | None = None
    num_chunks: int = 0
    num_chunk_tokens: int = 0
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def chunks_bound(self) -> int:
        """The most chunks that there can be; without counts, how many there are."""
        return len(self.chunk_query_lens) if self.counts is None else self.num_chunks

    @property
    def chunk_tokens_bound(self) -> int:
        """The most tokens of chunks that there can be; without counts, how many there are."""
        return sum(self.chunk_query_lens) if self.counts is None else self.num_chunk_tokens

    def exact(self) -> AttentionMetadata:
        """The same step with its numbers on the host. Waits for the device."""
        if self.counts is None:
            return self
        num_decodes, num_chunks = self.counts.tolist()
        num_rows = num_decodes + num_chunks
        starts = self.query_start_B1[num_decodes : num_rows + 1].tolist()
        return replace(
            self,
            num_decodes=num_decodes,
            block_table_BN=self.block_table_BN[:num_rows],
            seq_lens_B=self.seq_lens_B[:num_rows],
            query_start_B1=self.query_start_B1[: num_rows + 1],
            chunk_query_lens=tuple(end - start for start, end in pairwise(starts)),
            chunk_seq_lens=tuple(self.seq_lens_B[num_decodes:num_rows].tolist()),
            counts=None,
            memo={},
        )


@operation("paged_attention")
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
) -> Tensor:
    """Causal attention of each token over its sequence's cached keys and values, its own included.

    The decodes are computed together: the number of Python calls does not depend on their number. The reference
    computes the chunks one by one. Nothing waits for the device, but the reference if the metadata has counts.

    In batch-invariant mode (`ops.invariance`) the kernels give a token bitwise the same output in any batch,
    as a decode or in a chunk of any size, and whatever max_seq_len and counts are: tiles are of one shape, lie at
    fixed positions, and are summed in segments of fixed length in their order. The reference ignores the mode.

    Args:
        q_THD: queries, rotated.
        kv_cache: [2, num_blocks, block_size, K, D]; this step's keys and values are already in it. Every
            element must be finite (allocate it as zeros; `write_kv` keeps it so): masked positions are read.
            It may be float8_e4m3fn beside queries of another dtype, to which its elements are converted.
        scale: factor on q·k, positive.
        sliding_window: a token sees itself and the window - 1 positions before it.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        k_scale, v_scale: what the cached keys and values were divided by when they were written.

    Returns:
        [T, H, D], q's dtype.

    Raises:
        ValueError: the scales do not fit the cache's dtype.

    Source: PagedAttention, Kwon et al. 2023, section 4.1; grouped queries, Ainslie et al. 2023.
    """
    check_kv_scales(kv_cache.dtype, k_scale, v_scale)
    meta = meta.exact()
    num_decodes, scale = meta.num_decodes, scale * k_scale
    if not meta.chunk_query_lens and num_decodes == q_THD.shape[0]:
        return _scaled(_decode(q_THD, kv_cache, meta, scale, sliding_window, soft_cap), v_scale)
    out_THD = torch.zeros_like(q_THD)
    if num_decodes:
        out_THD[:num_decodes] = _decode(q_THD[:num_decodes], kv_cache, meta, scale, sliding_window, soft_cap)
    start = num_decodes
    for i, query_len in enumerate(meta.chunk_query_lens):
        chunk = slice(start, start + query_len)
        out_THD[chunk] = _chunk(q_THD[chunk], kv_cache, meta, i, scale, sliding_window, soft_cap)
        start += query_len
    return _scaled(out_THD, v_scale)


def _scaled(out_THD: Tensor, v_scale: float) -> Tensor:
    return out_THD if v_scale == 1.0 else out_THD * v_scale


paged_attention.kernel(TRITON, "tercet.ops.triton_attention", supports=on_cuda)


def _decode(
    q_BHD: Tensor,
    kv_cache: Tensor,
    meta: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """One token of each of B sequences, batched over gathered and masked keys and values."""
    batch, num_heads, head_dim = q_BHD.shape
    num_kv_heads = kv_cache.shape[3]
    key = ("decode", sliding_window, kv_cache.shape[2], q_BHD.dtype)
    if key not in meta.memo:
        meta.memo[key] = _decode_mask(meta, batch, kv_cache.shape[2], sliding_window, q_BHD.dtype)
    table_BN, bias_BL = meta.memo[key]
    q_BKGD = q_BHD.view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    bytes_per_row = 2 * table_BN.shape[1] * kv_cache[0, 0].nbytes
    rows = max(1, GATHER_BYTES_MAX // bytes_per_row)
    # One slice unless the batch is huge.
    parts = [
        _attend_gathered(
            q_BKGD[i : i + rows], kv_cache, table_BN[i : i + rows], bias_BL[i : i + rows], scale, soft_cap
        )
        for i in range(0, batch, rows)
    ]
    out_BKGD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out_BKGD.reshape(batch, num_heads, head_dim)


def _decode_mask(
    meta: AttentionMetadata, batch: int, block_size: int, sliding_window: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Blocks to gather for each decode row, and 0 or -inf for each of their positions."""
    num_blocks = min(-(-meta.max_seq_len // block_size), meta.block_table_BN.shape[1])
    table_BN = meta.block_table_BN[:batch, :num_blocks]
    # A row of length 0 or garbage sees one position: a softmax over nothing would be NaN.
    lens_B1 = meta.seq_lens_B[:batch, None].clamp(1, num_blocks * block_size)
    positions_BL = torch.arange(num_blocks * block_size, device=table_BN.device)[None]
    if sliding_window is not None and (-(-sliding_window // block_size) + 1) < num_blocks:
        table_BN, positions_BL = _window_blocks(table_BN, lens_B1, sliding_window, block_size)
    visible_BL = positions_BL < lens_B1
    if sliding_window is not None:
        visible_BL = visible_BL & (positions_BL >= lens_B1 - sliding_window)
    bias_BL = torch.zeros(visible_BL.shape, dtype=dtype, device=table_BN.device)
    return table_BN, bias_BL.masked_fill_(~visible_BL, float("-inf"))


def _window_blocks(
    table_BN: Tensor, lens_B1: Tensor, sliding_window: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """The blocks that hold each row's window, and the positions of their slots."""
    num_window_blocks = -(-sliding_window // block_size) + 1
    first_B1 = (lens_B1 - sliding_window).clamp_(min=0) // block_size
    index_BN = first_B1 + torch.arange(num_window_blocks, device=table_BN.device)[None]
    offsets = torch.arange(block_size, device=table_BN.device)
    positions_BL = (index_BN[:, :, None] * block_size + offsets).flatten(1)
    index_BN = index_BN.clamp(max=table_BN.shape[1] - 1).long()
    return table_BN.gather(1, index_BN), positions_BL


def _attend_gathered(
    q_BKGD: Tensor,
    kv_cache: Tensor,
    table_BN: Tensor,
    bias_BL: Tensor,
    scale: float,
    soft_cap: float | None,
) -> Tensor:
    batch, num_kv_heads, _, head_dim = q_BKGD.shape
    k_flat, v_flat = _gather(kv_cache, table_BN.reshape(-1))
    k_BKLD = k_flat.view(batch, -1, num_kv_heads, head_dim).transpose(1, 2)
    v_BKLD = v_flat.view(batch, -1, num_kv_heads, head_dim).transpose(1, 2)
    # The G query heads of a KV head stand where queries of one head would: no head is repeated.
    return _attend(q_BKGD, k_BKLD, v_BKLD, bias_BL[:, None, None], scale, soft_cap)


def _chunk(
    q_QHD: Tensor,
    kv_cache: Tensor,
    meta: AttentionMetadata,
    index: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Tensor:
    """Several tokens at the end of one sequence, the index-th of the chunks."""
    blocks_N, seq_len = meta.block_table_BN[meta.num_decodes + index], meta.chunk_seq_lens[index]
    query_len, num_heads, head_dim = q_QHD.shape
    block_size, num_kv_heads = kv_cache.shape[2], kv_cache.shape[3]
    start = seq_len - query_len
    first_block = 0
    if sliding_window is not None:
        first_block = max(0, start - sliding_window + 1) // block_size
    k_flat, v_flat = _gather(kv_cache, blocks_N[first_block : -(-seq_len // block_size)])
    first = first_block * block_size
    k_LKD = k_flat.view(-1, num_kv_heads, head_dim)[: seq_len - first]
    v_LKD = v_flat.view(-1, num_kv_heads, head_dim)[: seq_len - first]
    group = num_heads // num_kv_heads
    q_KGQD = q_QHD.view(query_len, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    k_KGLD = k_LKD.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    v_KGLD = v_LKD.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
    windowed = sliding_window is not None and sliding_window < seq_len
    bias_QL = None
    if start or windowed or soft_cap is not None:
        key = ("chunk", index, sliding_window, block_size, q_QHD.dtype)
        if key not in meta.memo:
            meta.memo[key] = _causal_bias(q_QHD, start, first, seq_len, sliding_window)
        bias_QL = meta.memo[key]
    out_KGQD = _attend(q_KGQD, k_KGLD, v_KGLD, bias_QL, scale, soft_cap)
    return out_KGQD.permute(2, 0, 1, 3).reshape(query_len, num_heads, head_dim)


def _causal_bias(q_QHD: Tensor, start: int, first: int, seq_len: int, sliding_window: int | None) -> Tensor:
    """0 where query position start + i sees key position first + j, -inf elsewhere."""
    query_Q1 = torch.arange(start, seq_len, device=q_QHD.device)[:, None]
    key_1L = torch.arange(first, seq_len, device=q_QHD.device)[None]
    hidden_QL = key_1L > query_Q1
    if sliding_window is not None:
        hidden_QL |= key_1L <= query_Q1 - sliding_window
    bias_QL = torch.zeros(hidden_QL.shape, dtype=q_QHD.dtype, device=q_QHD.device)
    return bias_QL.masked_fill_(hidden_QL, float("-inf"))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, soft_cap: float | None
) -> Tensor:
    """softmax(scale * q k^T + bias) v; without a bias, causal."""
    k, v = k.to(q.dtype), v.to(q.dtype)
    if soft_cap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale)
    assert bias is not None
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / soft_cap) * soft_cap + bias
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)


_workspace = threading.local()


def _gather(kv_cache: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some blocks, each [len(block_ids), block_size * K * D], valid until the next call.

    On a CPU they go into a buffer that is kept: fresh memory of this size costs five times the copy in page
    faults. CUDA's allocator keeps memory by itself.
    """
    dtype = kv_cache.dtype
    if dtype == torch.float8_e4m3fn:  # not every indexing operation knows it
        k_flat, v_flat = _gather(kv_cache.view(torch.uint8), block_ids)
        return k_flat.view(dtype), v_flat.view(dtype)
    k_cache, v_cache = kv_cache.flatten(2).unbind(0)
    if kv_cache.device.type != "cpu":
        return k_cache.index_select(0, block_ids), v_cache.index_select(0, block_ids)
    count, width = block_ids.shape[0], k_cache.shape[1]
    buffer: Tensor | None = getattr(_workspace, "buffer", None)
    if buffer is None or buffer.dtype != kv_cache.dtype or buffer.numel() < 2 * count * width:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            buffer = _workspace.buffer = torch.empty(2 * count * width, dtype=kv_cache.dtype)
    k_out, v_out = buffer[: 2 * count * width].view(2, count, width).unbind(0)
    torch.index_select(k_cache, 0, block_ids, out=k_out)
    torch.index_select(v_cache, 0, block_ids, out=v_out)
    return k_out, v_out
