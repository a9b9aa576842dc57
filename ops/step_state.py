"""From the rows on the device to the inputs of one step, without the host knowing their lengths.

The host sends one small buffer of int32 a step (`StepBuffer`): counts, changes of the block table, and which rows
run. Everything else, such as tokens, positions, cache slots and block tables of the step, is looked up on the
device, so that a captured step replays with whatever the buffer says. Dimensions: R rows, B sequences of a step
(decodes, then chunks; at most R), T tokens, S sampled rows (at most R), N blocks of a row, M positions of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops.registry import operation
from tercet.ops.triton_support import TRITON, on_any_cuda

# Places in the header of the buffer.
NUM_DECODES, NUM_CHUNKS, NUM_TOKENS, NUM_SAMPLES, NUM_CHANGES = range(5)
HEADER_SIZE = 8


@dataclass(frozen=True, slots=True)
class StepBuffer:
    """Where the parts of the buffer begin. What a steady step changes comes first, so that a prefix is sent.

    Attributes:
        num_rows: R.
        max_changes: capacity for changes of the block table.
        changes: [max_changes, 3]: row, index, block.
        seq_row: [R] rows of the step's sequences.
        seq_start: [R] position of the first token of a chunk; not looked at for decodes.
        query_start: [R + 1] first token of each sequence; decode i is token i.
        sample_token: [R] token whose hidden state is sampled from.
        sample_row: [R] row that gets it.
        size: of the whole buffer.
    """

    num_rows: int
    max_changes: int

    @property
    def changes(self) -> int:
        return HEADER_SIZE

    @property
    def seq_row(self) -> int:
        return HEADER_SIZE + _aligned(3 * self.max_changes)

    @property
    def seq_start(self) -> int:
        return self.seq_row + _aligned(self.num_rows)

    @property
    def query_start(self) -> int:
        return self.seq_start + _aligned(self.num_rows)

    @property
    def sample_token(self) -> int:
        return self.query_start + _aligned(self.num_rows + 1)

    @property
    def sample_row(self) -> int:
        return self.sample_token + _aligned(self.num_rows)

    @property
    def size(self) -> int:
        return self.sample_row + _aligned(self.num_rows)


@dataclass(frozen=True, slots=True)
class RowTensors:
    """What the device knows of its rows; see `worker_proc.device_batch`."""

    history_RM: Tensor  # i32
    lengths_R: Tensor  # i32
    finished_R: Tensor  # bool
    block_table_RN: Tensor  # i32


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Inputs of a step, written by `prepare_step`. Larger than any step: a step uses the first lines."""

    token_ids_T: Tensor  # i32
    positions_T: Tensor  # i64
    slot_mapping_T: Tensor  # i64
    seq_lens_B: Tensor  # i32
    block_table_BN: Tensor  # i32
    sample_token_S: Tensor  # i32
    sample_row_S: Tensor  # i32, -1 for lines beyond the samples
    frozen_S: Tensor  # i32, 1 where the row had finished before


@operation("prepare_step")
def prepare_step(
    buffer: Tensor,
    layout: StepBuffer,
    rows: RowTensors,
    step: StepTensors,
    *,
    block_size: int,
    num_tokens: int,
) -> None:
    """Apply the buffer's block changes, then write the inputs of the step into `step`.

    Lines of padding, beyond the buffer's counts and below `num_tokens` tokens or sampled rows, get token 0 at
    position 0 in slot 0 (the null block's) and sample_row -1. A finished row writes to slot 0: its blocks may
    belong to others by now. Nothing waits for the device but the reference.

    Args:
        buffer: int32 [layout.size].
        num_tokens: tokens of the step with padding, at least its sequences and samples with theirs.
    """
    host = buffer.tolist()
    num_decodes, num_chunks, tokens, num_samples, num_changes = host[:5]
    for i in range(num_changes):
        row, index, block = host[layout.changes + 3 * i :][:3]
        rows.block_table_RN[row, index] = block
    step.token_ids_T[:num_tokens] = 0
    step.positions_T[:num_tokens] = 0
    step.slot_mapping_T[:num_tokens] = 0
    step.sample_row_S[:num_tokens] = -1  # no more lines than there are rows
    step.sample_token_S[:num_tokens] = 0
    for i in range(num_decodes + num_chunks):
        row, first = host[layout.seq_row + i], host[layout.query_start + i]
        last = host[layout.query_start + i + 1]
        length = int(rows.lengths_R[row])
        start = length - 1 if i < num_decodes else host[layout.seq_start + i]
        end = start + last - first
        positions = torch.arange(start, end, device=buffer.device)
        table_N = rows.block_table_RN[row]
        slots = table_N[positions // block_size].long() * block_size + positions % block_size
        step.token_ids_T[first:last] = rows.history_RM[row, start:end]
        step.positions_T[first:last] = positions
        step.slot_mapping_T[first:last] = 0 if rows.finished_R[row] else slots
        step.seq_lens_B[i] = end
        step.block_table_BN[i] = table_N
    for i in range(num_samples):
        row = host[layout.sample_row + i]
        step.sample_row_S[i] = row
        step.sample_token_S[i] = host[layout.sample_token + i]
        step.frozen_S[i] = int(rows.finished_R[row])
    assert tokens <= num_tokens


prepare_step.kernel(TRITON, "tercet.ops.triton_step", supports=on_any_cuda)


def _aligned(count: int) -> int:
    """Parts begin at multiples of 16 bytes, so that kernels may load four numbers at once."""
    return -(-count // 4) * 4
