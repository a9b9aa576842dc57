"""Triton bodies of `prepare_step`, which `triton_step.py` launches."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["table_stride"])
def change_blocks_kernel(
    buffer, table, table_stride, CHANGES: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (block of changes): table[row, index] = block."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < tl.load(buffer + COUNT)
    change = buffer + CHANGES + 3 * i
    row = tl.load(change, mask=keep, other=0).to(tl.int64)
    index = tl.load(change + 1, mask=keep, other=0)
    tl.store(table + row * table_stride + index, tl.load(change + 2, mask=keep, other=0), mask=keep)


@triton.jit(
    do_not_specialize=["num_tokens", "table_stride", "history_stride", "step_table_stride", "max_samples"]
)
def prepare_step_kernel(
    buffer, history, history_stride, lengths, finished, table, table_stride,
    token_ids, positions, slots, seq_lens, step_table, step_table_stride, sample_token, sample_row, frozen,
    num_tokens, max_samples,
    SEQ_ROW: tl.constexpr, SEQ_START: tl.constexpr, QUERY_START: tl.constexpr, SAMPLE_TOKEN: tl.constexpr,
    SAMPLE_ROW: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i: sequence i of the step, its i-th sample, or a token of padding."""
    i = tl.program_id(0)
    num_decodes, num_chunks = tl.load(buffer), tl.load(buffer + 1)
    used_tokens, num_samples = tl.load(buffer + 2), tl.load(buffer + 3)
    num_sequences = num_decodes + num_chunks
    if i < num_samples:
        sampled = tl.load(buffer + SAMPLE_ROW + i)
        tl.store(sample_row + i, sampled)
        tl.store(sample_token + i, tl.load(buffer + SAMPLE_TOKEN + i))
        tl.store(frozen + i, tl.load(finished + sampled).to(tl.int32))
    elif i < max_samples:
        tl.store(sample_row + i, -1)
        tl.store(sample_token + i, 0)
    if i >= num_sequences:
        token = used_tokens + i - num_sequences
        if token < num_tokens:
            tl.store(token_ids + token, 0)
            tl.store(positions + token, 0)
            tl.store(slots + token, 0)
        return
    row = tl.load(buffer + SEQ_ROW + i).to(tl.int64)
    first = tl.load(buffer + QUERY_START + i)
    count = tl.load(buffer + QUERY_START + i + 1) - first
    start = tl.load(lengths + row) - 1
    if i >= num_decodes:
        start = tl.load(buffer + SEQ_START + i)
    is_live = tl.load(finished + row) == 0
    end = start + count
    tl.store(seq_lens + i, end)
    table += row * table_stride
    for begin in range(0, count, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        keep = t < count
        position = start + t
        token = tl.load(history + row * history_stride + position, mask=keep, other=0)
        block = tl.load(table + position // BLOCK_SIZE, mask=keep, other=0).to(tl.int64)
        slot = tl.where(is_live, block * BLOCK_SIZE + position % BLOCK_SIZE, 0)
        tl.store(token_ids + first + t, token, mask=keep)
        tl.store(positions + first + t, position.to(tl.int64), mask=keep)
        tl.store(slots + first + t, slot, mask=keep)
    step_table += i.to(tl.int64) * step_table_stride
    num_blocks = tl.cdiv(end, BLOCK_SIZE)
    for begin in range(0, num_blocks, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        tl.store(step_table + n, tl.load(table + n, mask=n < num_blocks, other=0), mask=n < num_blocks)


@triton.jit
def copy_pieces_kernel(arena, pieces, BLOCK: tl.constexpr):
    """Program (piece): `size` bytes from `offset` of the arena to the address `target`."""
    piece = pieces + 3 * tl.program_id(0)
    target, offset, size = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
    if (target % 4 == 0) & (size % 4 == 0):
        from_words = (arena + offset).to(tl.pointer_type(tl.int32))
        to_words = target.to(tl.pointer_type(tl.int32))
        for begin in range(0, size // 4, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            keep = i < size // 4
            tl.store(to_words + i, tl.load(from_words + i, mask=keep), mask=keep)
    else:
        from_bytes, to_bytes = arena + offset, target.to(tl.pointer_type(tl.uint8))
        for begin in range(0, size, BLOCK):
            i = begin + tl.arange(0, BLOCK)
            keep = i < size
            tl.store(to_bytes + i, tl.load(from_bytes + i, mask=keep), mask=keep)
