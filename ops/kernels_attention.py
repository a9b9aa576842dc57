"""Triton bodies of paged attention, which `triton_attention.py` launches.

Softmax is in base 2 (log2 e goes into the factor on the scores), so that exp2 serves. A masked score is a large
negative number and not -inf: a row whose first tiles are all masked then gathers finite rubbish, which the first
visible score multiplies by exp2(-1e30 - score) = 0.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def _load_tile(
    base,
    slot_N,
    keep_N,
    HEAD_STRIDE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[N, D_PAD] keys or values of one head at some slots; `base` is that head's at slot 0."""
    d = tl.arange(0, D_PAD)
    pointers = base + slot_N[:, None] * HEAD_STRIDE + d[None, :]
    if MASKED:
        if D_PAD == D:
            return tl.load(pointers, mask=keep_N[:, None], other=0.0)
        return tl.load(pointers, mask=keep_N[:, None] & (d[None, :] < D), other=0.0)
    if D_PAD == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=d[None, :] < D, other=0.0)


@triton.jit
def _attend(
    acc, best_M, total_M, q, pos_M, begin, end, limit, table, k_base, v_base, scale, soft_cap,
    BLOCK_SIZE: tl.constexpr, SLOT_STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of positions in [begin, end); `limit` ends the sequence.

    Each line of q sees positions up to its own, pos_M, and with a WINDOW only so many of them. Without MASKED
    every position of these tiles is visible to every line.
    """
    for start in range(begin, end, N):
        pos_N = start + tl.arange(0, N)
        keep_N = pos_N < limit
        if MASKED:
            block_N = tl.load(table + pos_N // BLOCK_SIZE, mask=keep_N, other=0)
        else:
            block_N = tl.load(table + pos_N // BLOCK_SIZE)
        slot_N = block_N.to(tl.int64) * BLOCK_SIZE + pos_N % BLOCK_SIZE
        k = _load_tile(k_base, slot_N, keep_N, SLOT_STRIDE, D, D_PAD, MASKED).to(q.dtype)
        if SOFT_CAP:
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale / soft_cap)
            score = _tanh(score) * (soft_cap * LOG2_E)
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)
        # Masked after scaling: were the mask's value scaled too, a fused multiply-add would leave its rounding
        # error, some 1e22, for exp2.
        if MASKED:
            visible = pos_N[None, :] <= pos_M[:, None]
            if WINDOW:
                visible = visible & (pos_N[None, :] > pos_M[:, None] - WINDOW)
            score = tl.where(visible, score, MASKED_SCORE)
        new_best_M = tl.maximum(best_M, tl.max(score, 1))
        p = tl.exp2(score - new_best_M[:, None])
        shrink_M = tl.exp2(best_M - new_best_M)
        total_M = total_M * shrink_M + tl.sum(p, 1)
        v = _load_tile(v_base, slot_N, keep_N, SLOT_STRIDE, D, D_PAD, MASKED).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * shrink_M[:, None], input_precision="ieee")
        best_M = new_best_M
    return acc, best_M, total_M


@triton.jit
def _first_position(length, WINDOW: tl.constexpr, N: tl.constexpr):
    """Start of the first tile that the last token of a sequence sees."""
    if WINDOW:
        return tl.maximum(length - WINDOW, 0) // N * N
    return 0


@triton.jit
def _split_length(length, num_splits, WINDOW: tl.constexpr, N: tl.constexpr):
    """Positions of each split but the last: whole tiles. Splits at or beyond the length are empty."""
    tiles = tl.cdiv(length - _first_position(length, WINDOW, N), N)
    return tl.cdiv(tiles, num_splits) * N


@triton.jit(
    do_not_specialize=["table_stride", "max_context", "num_splits"],
    do_not_specialize_on_alignment=["lens", "table"],
)
def decode_kernel(
    out, parts, q, kv_cache, v_offset, table, lens, q_stride, table_stride, max_context, num_splits, scale, soft_cap,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Program (row and KV head, split): the G query heads of one KV head over one split of the context."""
    row, head = tl.program_id(0) // K, tl.program_id(0) % K
    split = tl.program_id(1)
    # A frozen row may hold any length; its table holds valid blocks.
    length = tl.minimum(tl.maximum(tl.load(lens + row), 1), max_context)
    begin = _first_position(length, WINDOW, N)
    end = length
    if SPLIT:
        per_split = _split_length(length, num_splits, WINDOW, N)
        begin += split * per_split
        end = tl.minimum(begin + per_split, length)
        if begin >= length:
            return
    m, d = tl.arange(0, M), tl.arange(0, D_PAD)
    keep = (m[:, None] < G) & (d[None, :] < D)
    line = head * G + m
    query = tl.load(q + row.to(tl.int64) * q_stride + line[:, None] * D + d[None, :], mask=keep, other=0.0)
    acc, best_M, total_M = _attend(
        tl.zeros([M, D_PAD], tl.float32), tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32),
        query, length - 1 + tl.zeros([M], tl.int32), begin, end, end, table + row.to(tl.int64) * table_stride,
        kv_cache + head * D, kv_cache + v_offset + head * D, scale, soft_cap,
        BLOCK_SIZE, K * D, D, D_PAD, N, WINDOW, SOFT_CAP, True,
    )  # fmt: skip
    result = acc / total_M[:, None]
    line = row.to(tl.int64) * (K * G) + line
    if SPLIT:
        lines = tl.num_programs(0).to(tl.int64) * G
        tl.store(parts + (line[:, None] * num_splits + split) * D + d[None, :], result, mask=keep)
        weights = parts + lines * num_splits * D
        tl.store(weights + line * num_splits + split, best_M + tl.log2(total_M), mask=m < G)
    else:
        tl.store(out + line[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["max_context", "num_splits"], do_not_specialize_on_alignment=["lens"])
def combine_kernel(
    out, parts, lens, max_context, num_splits,
    H: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr, S: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Program (row and query head): the splits' results, weighted by their sums of exponentials."""
    line = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(lens + line // H), 1), max_context)
    per_split = _split_length(length, num_splits, WINDOW, N)
    s, d = tl.arange(0, S), tl.arange(0, D_PAD)
    full = (s < num_splits) & (_first_position(length, WINDOW, N) + s * per_split < length)
    weights = parts + tl.num_programs(0).to(tl.int64) * num_splits * D
    weight_S = tl.load(weights + line * num_splits + s, mask=full, other=float("-inf"))
    weight_S = tl.exp2(weight_S - tl.max(weight_S, 0))
    pointers = parts + (line * num_splits + s[:, None]) * D + d[None, :]
    part_SD = tl.load(pointers, mask=full[:, None] & (d[None, :] < D), other=0.0)
    result = tl.sum(part_SD * weight_S[:, None], 0) / tl.sum(weight_S, 0)
    tl.store(out + line * D + d, result.to(out.dtype.element_ty), mask=d < D)


@triton.jit(
    do_not_specialize=["table_stride", "num_chunks", "num_decodes"],
    do_not_specialize_on_alignment=["lens", "starts", "table"],
)
def prefill_kernel(
    out, q, kv_cache, v_offset, table, lens, starts, q_stride, table_stride, num_chunks, num_decodes, scale, soft_cap,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries and KV head): Q tokens of one chunk, each with its G heads, over their context."""
    Q: tl.constexpr = M // G
    head = tl.program_id(0) % K
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // K  # the longest contexts first
    # Chunk i begins at tile (its first token) // Q + i, so that each has all the tiles that it needs.
    low: tl.int32 = 0
    high = num_chunks
    while low < high:
        middle = (low + high) // 2
        first_tile = (tl.load(starts + num_decodes + middle) - num_decodes) // Q + middle
        if first_tile <= tile:
            low = middle + 1
        else:
            high = middle
    row = num_decodes + low - 1
    first = tl.load(starts + row)
    query_len = tl.load(starts + row + 1) - first
    token = (tile - (first - num_decodes) // Q - (low - 1)) * Q
    if token >= query_len:
        return
    length = tl.load(lens + row)
    pos = length - query_len + token  # of the tile's first token
    m, d = tl.arange(0, M), tl.arange(0, D_PAD)
    keep = ((m < Q * G) & (token + m // G < query_len))[:, None] & (d[None, :] < D)
    pos_M = pos + m // G
    offset = (first + token + m // G).to(tl.int64)
    within = (head * G + m % G)[:, None] * D + d[None, :]
    query = tl.load(q + offset[:, None] * q_stride + within, mask=keep, other=0.0)
    table += row.to(tl.int64) * table_stride
    k_base, v_base = kv_cache + head * D, kv_cache + v_offset + head * D
    acc = tl.zeros([M, D_PAD], tl.float32)
    best_M, total_M = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    end = tl.minimum(pos + Q, length)
    if WINDOW:
        begin = _first_position(pos + 1, WINDOW, N)
    else:
        begin = (pos + 1) // N * N  # up to here every line sees every position
        acc, best_M, total_M = _attend(
            acc, best_M, total_M, query, pos_M, 0, begin, length, table, k_base, v_base, scale, soft_cap,
            BLOCK_SIZE, K * D, D, D_PAD, N, WINDOW, SOFT_CAP, False,
        )  # fmt: skip
    acc, best_M, total_M = _attend(
        acc, best_M, total_M, query, pos_M, begin, end, length, table, k_base, v_base, scale, soft_cap,
        BLOCK_SIZE, K * D, D, D_PAD, N, WINDOW, SOFT_CAP, True,
    )  # fmt: skip
    result = (acc / total_M[:, None]).to(out.dtype.element_ty)
    tl.store(out + offset[:, None] * (K * G * D) + within, result, mask=keep)
