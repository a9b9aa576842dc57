"""The Triton body of paged attention, which `triton_attention.py` launches.

One kernel serves decodes, chunks, and both at once. Its work is cut into items: a tile of queries of one sequence,
one KV head, one split of the context. Which item a program does follows on the device from the sequences' lengths
alone, so a captured launch fits every step of its size. The program that finishes the last split of a tile of
queries combines them all; there is no second launch.

Softmax is in base 2. Scores are scaled where the exponent is taken, in one fused multiply-add; hidden scores are
-inf, and the running maximum starts at a large negative number instead, so that nothing is ever inf - inf. Steps
that a line does not see change none of its bits: it adds exact zeros, or is multiplied by an exact zero later.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # the maximum of no scores
INFINITY = tl.constexpr(float("inf"))
UNSPLIT = tl.constexpr(1 << 20)  # tiles of a split that takes any context whole

DECODES = tl.constexpr(0)  # the sequences that a launch serves
CHUNKS = tl.constexpr(1)
ALL = tl.constexpr(2)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)


@triton.jit
def _load_tile(pointers, keep_N, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr):
    """[N, D_PAD] keys or values, 0 where masked."""
    d = tl.arange(0, D_PAD)
    if MASKED:
        if D_PAD == D:
            return tl.load(pointers, mask=keep_N[:, None], other=0.0)
        return tl.load(pointers, mask=keep_N[:, None] & (d[None, :] < D), other=0.0)
    if D_PAD == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=d[None, :] < D, other=0.0)


@triton.jit
def _tile_offsets(
    table, start, limit,
    BLOCK_SIZE: tl.constexpr, SLOT_STRIDE: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the keys of positions start .. start + N lie from slot 0; int64 with WIDE."""
    n = tl.arange(0, N)
    if N % BLOCK_SIZE == 0:  # tiles begin with a block: all but the block ids is the same in every tile
        block = table + start // BLOCK_SIZE + n // BLOCK_SIZE
        within = n % BLOCK_SIZE
    else:
        block = table + (start + n) // BLOCK_SIZE
        within = (start + n) % BLOCK_SIZE
    if MASKED:
        block_N = tl.load(block, mask=start + n < limit, other=0)
    else:
        block_N = tl.load(block)
    if WIDE:
        block_N = block_N.to(tl.int64)
    return block_N * (BLOCK_SIZE * SLOT_STRIDE) + within * SLOT_STRIDE


@triton.jit
def _attend(
    acc, best_M, total_M, q, pos_M, begin, end, limit, table, k_base, v_base, scale, soft_cap,
    BLOCK_SIZE: tl.constexpr, SLOT_STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the tiles of positions in [begin, end), begin a multiple of N; `limit` ends the sequence.

    Each line of q sees positions up to its own, pos_M, and with a WINDOW only so many of them. Without MASKED
    every position of these tiles is visible to every line.
    """
    d = tl.arange(0, D_PAD)
    for start in range(begin, end, N):
        pos_N = start + tl.arange(0, N)
        keep_N = pos_N < limit
        offset_N = _tile_offsets(table, start, limit, BLOCK_SIZE, SLOT_STRIDE, N, MASKED, WIDE)
        offset = offset_N[:, None] + d[None, :]
        k = _load_tile(k_base + offset, keep_N, D, D_PAD, MASKED).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        factor = scale * LOG2_E
        if SOFT_CAP:
            score = _tanh(score * (scale / soft_cap))
            factor = soft_cap * LOG2_E
        if MASKED:
            visible = pos_N[None, :] <= pos_M[:, None]
            if WINDOW:
                visible = visible & (pos_N[None, :] > pos_M[:, None] - WINDOW)
            score = tl.where(visible, score, -INFINITY)
        new_best_M = tl.maximum(best_M, tl.max(score, 1) * factor)
        p = tl.exp2(tl.fma(score, tl.full(score.shape, factor, tl.float32), -new_best_M[:, None]))
        shrink_M = tl.exp2(best_M - new_best_M)
        total_M = tl.fma(total_M, shrink_M, tl.sum(p, 1))
        v = _load_tile(v_base + offset, keep_N, D, D_PAD, MASKED).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * shrink_M[:, None], input_precision="ieee")
        best_M = new_best_M
    return acc, best_M, total_M


@triton.jit
def _merge(acc, best, total, other_acc, other_best, other_total):
    """Softmax sums over two sets of positions as the sums over both. Written so that each product is rounded in
    the same way wherever this is compiled into."""
    new_best = tl.maximum(best, other_best)
    shrink, other_shrink = tl.exp2(best - new_best), tl.exp2(other_best - new_best)
    total = tl.fma(other_total, other_shrink, total * shrink)
    other_shrink = tl.broadcast_to(other_shrink[:, None], acc.shape)
    acc = tl.fma(other_acc, other_shrink, acc * shrink[:, None])
    return acc, new_best, total


@triton.jit
def _first_tile(length, WINDOW: tl.constexpr, N: tl.constexpr):
    """The first tile that the last token of a sequence of this length sees."""
    if WINDOW:
        first = tl.maximum(length - WINDOW, 0) // N
    else:
        first = 0
    return first


@triton.jit
def _first_split_tile(length, query_len, WINDOW: tl.constexpr, N: tl.constexpr, SEGMENT: tl.constexpr):
    """Where the splits of a sequence begin: at the first tile that any of its queries sees, with SEGMENT at the
    segment that holds it."""
    first = _first_tile(length - query_len + 1, WINDOW, N)
    if SEGMENT:
        first = first // SEGMENT * SEGMENT
    return first


@triton.jit
def _find_item(
    item, lens, starts, num_rows, max_context, programs,
    K: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr,
    R_PAD: tl.constexpr, LEAST_SPLIT: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """The item-th item of a KV head: its row (num_rows or more if there is none), its number among that row's
    items, its number among those of all rows that are split, and the tiles of a split.

    A split takes so many tiles that all work makes about `programs` of them, so those of split rows are at most
    2 * programs over all heads (a row of more than L tiles has fewer than 2 tiles / L splits). With SEGMENT a
    split is one segment where that many fit, and otherwise all segments are left to one program.
    """
    r = tl.arange(0, R_PAD)
    is_row = r < num_rows
    query_len = is_row.to(tl.int32)
    if ROWS != DECODES:
        start = tl.load(starts + r, mask=is_row, other=0)
        query_len = tl.load(starts + r + 1, mask=is_row, other=0) - start
    length = tl.minimum(tl.maximum(tl.load(lens + r, mask=is_row, other=0), query_len), max_context)
    q_tiles = tl.cdiv(query_len, Q)
    tiles = tl.cdiv(length, N) - _first_split_tile(length, query_len, WINDOW, N, SEGMENT)
    if SEGMENT:
        items = tl.sum(q_tiles * tl.cdiv(tiles, SEGMENT), 0) * K
        per_split = tl.where(items <= 2 * programs, SEGMENT, UNSPLIT)
    else:
        per_split = tl.maximum(tl.cdiv(tl.sum(q_tiles * tiles, 0) * K, programs), LEAST_SPLIT)
    splits = tl.cdiv(tiles, per_split)
    items = q_tiles * splits
    is_before = tl.cumsum(items, 0) <= item
    row = tl.sum(is_before.to(tl.int32), 0)
    within = item - tl.sum(tl.where(is_before, items, 0), 0)
    slot = item - tl.sum(tl.where(is_before & (splits == 1), items, 0), 0)
    return row, within, slot, per_split


@triton.jit
def _store_part(
    parts, slot, programs, acc, best_M, total_M, keep_M,
    LINES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Keep a split's sums. `parts` is [2 * programs, LINES, D], then maxima and sums of exponentials of each line."""
    m, d = tl.arange(0, acc.shape[0]), tl.arange(0, D_PAD)
    line = slot.to(tl.int64) * LINES + m
    tl.store(parts + line[:, None] * D + d[None, :], acc, mask=keep_M[:, None] & (d[None, :] < D))
    best = parts + programs.to(tl.int64) * (2 * LINES * D)
    tl.store(best + line, best_M, mask=keep_M)
    tl.store(best + programs * (2 * LINES) + line, total_M, mask=keep_M)


@triton.jit
def _combine(
    out, parts, slot, slot_stride, num_splits, programs, first_line, num_lines, v_scale,
    head, G: tl.constexpr, H: tl.constexpr, LINES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    L: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a tile of queries in their order, L lines at a time, and write the result.

    Args:
        slot, slot_stride: the first split's place in parts, and the distance to the next one's.
        first_line: the tile's first token.
        num_lines: tokens of the tile times G.
    """
    d = tl.arange(0, D_PAD)
    best = parts + programs.to(tl.int64) * (2 * LINES * D)
    for line in range(0, num_lines, L):
        m = line + tl.arange(0, L)
        keep_L = m < num_lines
        keep = keep_L[:, None] & (d[None, :] < D)
        acc = tl.zeros([L, D_PAD], tl.float32)
        best_L, total_L = tl.full([L], LOWEST, tl.float32), tl.zeros([L], tl.float32)
        for split in range(0, num_splits, UNROLL):
            for i in tl.static_range(UNROLL):  # their loads are under way together
                at = (slot + (split + i) * slot_stride).to(tl.int64) * LINES + m
                has = split + i < num_splits
                part_best = tl.load(best + at, mask=keep_L & has, other=LOWEST, cache_modifier=".cg")
                part_total = tl.load(
                    best + programs * (2 * LINES) + at, mask=keep_L & has, other=0.0, cache_modifier=".cg"
                )
                part = tl.load(
                    parts + at[:, None] * D + d[None, :], mask=keep & has, other=0.0, cache_modifier=".cg"
                )
                acc, best_L, total_L = _merge(acc, best_L, total_L, part, part_best, part_total)
        result = acc / total_L[:, None] * v_scale
        at = (first_line + m // G).to(tl.int64) * (H * D) + (head * G + m % G) * D
        tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=keep)


@triton.jit(
    do_not_specialize=["num_decodes", "num_chunks", "table_stride", "max_context", "programs"],
    do_not_specialize_on_alignment=["lens", "starts", "counts", "table"],
)
def attention_kernel(
    out, parts, arrivals, q, kv_cache, v_offset, table, lens, starts, counts, num_decodes, num_chunks,
    q_stride, table_stride, max_context, programs, scale, soft_cap, v_scale,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, ROWS: tl.constexpr, COUNTED: tl.constexpr, R_PAD: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, D_PAD: tl.constexpr, LEAST_SPLIT: tl.constexpr, SEGMENT: tl.constexpr, LINES: tl.constexpr,
    COMBINED_LINES: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (item, KV head): a tile of Q = M // G tokens of one sequence, each with its G heads, over one split.

    Args:
        parts: float32 [2 * programs, LINES, D + 2], what splits leave for the one that combines them.
        arrivals: int32 [2 * programs], splits that are done; zero between launches.
        counts: int32 [2], read with COUNTED: the decodes and chunks that there are.
        num_decodes, num_chunks: the same without COUNTED.
        max_context: no row is taken to be longer (a frozen one may hold any length).
        programs: splits to make of all the work, about.
        v_scale: factor on the values; that on the keys is part of `scale`.
        ROWS: which sequences.
        LEAST_SPLIT: tiles of a split, at least.
        SEGMENT: tiles that are summed up before they join the rest, 0 for all; fixes the order of every sum.
        LINES, COMBINED_LINES: lines of a tile that parts keep; those that are combined at a time.
        WIDE: the cache has 2^31 elements or more.
        PDL: started before its predecessor has finished, see `programmatic_launch`.
    """
    Q: tl.constexpr = M // G
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    head, item = tl.program_id(0) % K, tl.program_id(0) // K
    if COUNTED:
        num_decodes = tl.load(counts)
        num_chunks = tl.load(counts + 1)
    if ROWS == DECODES:
        first_row, num_rows = 0, num_decodes
    elif ROWS == CHUNKS:
        first_row, num_rows = num_decodes, num_chunks
    else:
        first_row, num_rows = 0, num_decodes + num_chunks
    row, within, slot, per_split = _find_item(
        item, lens + first_row, starts + first_row, num_rows, max_context, programs,
        K, Q, N, WINDOW, ROWS, R_PAD, LEAST_SPLIT, SEGMENT,
    )  # fmt: skip
    if row >= num_rows:
        return
    row += first_row
    if ROWS == DECODES:
        first, query_len = row, 1
    else:
        first = tl.load(starts + row)
        query_len = tl.load(starts + row + 1) - first
    length = tl.minimum(tl.maximum(tl.load(lens + row), query_len), max_context)
    base = _first_split_tile(length, query_len, WINDOW, N, SEGMENT)
    row_splits = tl.cdiv(tl.cdiv(length, N) - base, per_split)
    split = within % row_splits
    token = (tl.cdiv(query_len, Q) - 1 - within // row_splits) * Q  # the longest contexts first
    pos = length - query_len + token  # of the tile's first token
    end = tl.minimum(pos + Q, length)
    first_tile = _first_tile(pos + 1, WINDOW, N)
    low = (first_tile - base) // per_split  # splits from here
    high = tl.cdiv(tl.cdiv(end, N) - base, per_split)  # to before here hold what this tile of queries sees
    if (split < low) | (split >= high):
        return

    m, d = tl.arange(0, M), tl.arange(0, D_PAD)
    keep_M = (m < Q * G) & (token + m // G < query_len)
    keep = keep_M[:, None] & (d[None, :] < D)
    line_M = (first + token + m // G).to(tl.int64)
    within_M = (head * G + m % G) * D
    query = tl.load(q + (line_M * q_stride + within_M)[:, None] + d[None, :], mask=keep, other=0.0)
    table += row.to(tl.int64) * table_stride
    k_base, v_base = kv_cache + head * D, kv_cache + v_offset + head * D
    pos_M = pos + m // G
    begin = tl.maximum(base + split * per_split, first_tile) * N
    stop = tl.minimum((base + (split + 1) * per_split) * N, end)
    seen = (pos + 1) // N * N  # up to here every line sees every position
    acc = tl.zeros([M, D_PAD], tl.float32)
    best_M, total_M = tl.full([M], LOWEST, tl.float32), tl.zeros([M], tl.float32)
    if SEGMENT:
        S: tl.constexpr = SEGMENT * N
        for segment in range(begin // S * S, stop, S):
            part = tl.zeros([M, D_PAD], tl.float32)
            part_best, part_total = tl.full([M], LOWEST, tl.float32), tl.zeros([M], tl.float32)
            part, part_best, part_total = _attend_both(
                part, part_best, part_total, query, pos_M, tl.maximum(segment, begin), seen,
                tl.minimum(segment + S, stop), length, table, k_base, v_base, scale, soft_cap,
                BLOCK_SIZE, K * D, D, D_PAD, N, WINDOW, SOFT_CAP, ROWS == DECODES, WIDE,
            )  # fmt: skip
            acc, best_M, total_M = _merge(acc, best_M, total_M, part, part_best, part_total)
    else:
        acc, best_M, total_M = _attend_both(
            acc, best_M, total_M, query, pos_M, begin, seen, stop, length, table, k_base, v_base, scale, soft_cap,
            BLOCK_SIZE, K * D, D, D_PAD, N, WINDOW, SOFT_CAP, ROWS == DECODES, WIDE,
        )  # fmt: skip
    if high - low == 1:
        result = (acc / total_M[:, None] * v_scale).to(out.dtype.element_ty)
        tl.store(out + (line_M * (K * G * D) + within_M)[:, None] + d[None, :], result, mask=keep)
    else:
        group = (slot - split) * K + head
        _store_part(parts, slot * K + head, programs, acc, best_M, total_M, keep_M, LINES, D, D_PAD)
        tl.debug_barrier()  # all of the program's stores come before the count that announces them
        arrived = tl.atomic_add(arrivals + group, 1, sem="acq_rel", scope="gpu")
        if arrived == high - low - 1:
            num_lines = tl.minimum(query_len - token, Q) * G
            _combine(
                out, parts, group + low * K, K, high - low, programs, first + token, num_lines, v_scale,
                head, G, K * G, LINES, D, D_PAD, COMBINED_LINES, 8 if COMBINED_LINES * D_PAD <= 512 else 2,
            )  # fmt: skip
            tl.store(arrivals + group, 0)


@triton.jit
def _attend_both(
    acc, best_M, total_M, q, pos_M, begin, seen, end, limit, table, k_base, v_base, scale, soft_cap,
    BLOCK_SIZE: tl.constexpr, SLOT_STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, ONE_TOKEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`_attend` over [begin, end), without masks up to `seen` where that saves anything."""
    masked_from = begin
    if not WINDOW and not ONE_TOKEN:
        masked_from = tl.maximum(tl.minimum(seen, end), begin)
        acc, best_M, total_M = _attend(
            acc, best_M, total_M, q, pos_M, begin, masked_from, limit, table, k_base, v_base, scale, soft_cap,
            BLOCK_SIZE, SLOT_STRIDE, D, D_PAD, N, WINDOW, SOFT_CAP, False, WIDE,
        )  # fmt: skip
    acc, best_M, total_M = _attend(
        acc, best_M, total_M, q, pos_M, masked_from, end, limit, table, k_base, v_base, scale, soft_cap,
        BLOCK_SIZE, SLOT_STRIDE, D, D_PAD, N, WINDOW, SOFT_CAP, True, WIDE,
    )  # fmt: skip
    return acc, best_M, total_M
