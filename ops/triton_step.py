"""Launches what keeps the rows on the device: `prepare_step`, and copies of many small pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.ops import kernels_step
from tercet.ops.launch import Kernel
from tercet.ops.step_state import NUM_CHANGES, RowTensors, StepBuffer, StepTensors

_change_blocks_kernel = Kernel(kernels_step.change_blocks_kernel)
_copy_pieces_kernel = Kernel(kernels_step.copy_pieces_kernel)
_prepare_step_kernel = Kernel(kernels_step.prepare_step_kernel)

_CHANGES_PER_PROGRAM = 1024
_TOKENS_AT_A_TIME = 128
_WORDS_AT_A_TIME = 1024


def prepare_step(
    buffer: Tensor,
    layout: StepBuffer,
    rows: RowTensors,
    step: StepTensors,
    *,
    block_size: int,
    num_tokens: int,
) -> None:
    """As `ops.prepare_step`."""
    table = rows.block_table_RN
    _change_blocks_kernel[(-(-layout.max_changes // _CHANGES_PER_PROGRAM),)](
        buffer,
        table,
        table.stride(0),
        CHANGES=layout.changes,
        COUNT=NUM_CHANGES,
        BLOCK=_CHANGES_PER_PROGRAM,
        num_warps=4,
    )
    _prepare_step_kernel[(num_tokens,)](
        buffer,
        rows.history_RM,
        rows.history_RM.stride(0),
        rows.lengths_R,
        rows.finished_R,
        table,
        table.stride(0),
        step.token_ids_T,
        step.positions_T,
        step.slot_mapping_T,
        step.seq_lens_B,
        step.block_table_BN,
        step.block_table_BN.stride(0),
        step.sample_token_S,
        step.sample_row_S,
        step.frozen_S,
        num_tokens,
        min(num_tokens, layout.num_rows),
        SEQ_ROW=layout.seq_row,
        SEQ_START=layout.seq_start,
        QUERY_START=layout.query_start,
        SAMPLE_TOKEN=layout.sample_token,
        SAMPLE_ROW=layout.sample_row,
        BLOCK_SIZE=block_size,
        BLOCK=_TOKENS_AT_A_TIME,
        num_warps=1,
    )


def copy_pieces(arena: Tensor, count: int) -> None:
    """Copy pieces of an arena to where they belong.

    Args:
        arena: uint8; begins with `count` triples of int64: target address, offset of the piece in the arena, and
            its size in bytes. Targets are on the arena's device and do not overlap.
    """
    pieces = arena[: count * 24].view(torch.int64)
    _copy_pieces_kernel[(count,)](arena, pieces, BLOCK=_WORDS_AT_A_TIME, num_warps=4)
