"""Launches the Triton kernels of `sample_rows`: two for greedy and temperature, three for full.

Grids depend on the number of lines and the vocabulary alone, and every look at the data is the device's, so that
a launch can be captured and replayed. scan reads the logits once, in parts of fixed size so that a line's sums do
not depend on how many lines there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops import kernels_sampling
from tercet.ops.launch import Kernel
from tercet.ops.sample_rows import RowHistory, SamplingTables, Variant
from tercet.ops.triton_support import next_power_of_2

_finish_kernel = Kernel(kernels_sampling.finish_kernel)
_restrict_kernel = Kernel(kernels_sampling.restrict_kernel)
_scan_kernel = Kernel(kernels_sampling.scan_kernel)

_MAX_GROUPS = 1 << 14  # of a line: restrict holds one logit of each in registers
_STOP_TILE = 32


@dataclass(frozen=True, slots=True)
class Tiles:
    """Sizes of the kernels' tiles, in tokens, and how Triton runs them.

    Attributes:
        scan: tokens of a part; a power of two. Sums of weights depend on it in the last bits.
        group: least tokens of a group, of which restrict visits all or none; a power of two, at most `scan`.
        restrict: tokens that restrict looks at together; a power of two.
    """

    scan: int = 2048
    scan_warps: int = 4
    group: int = 16
    restrict: int = 2048
    restrict_warps: int = 16


TILES = Tiles()


@dataclass(frozen=True, slots=True)
class _Shape:
    lines: int
    vocab_size: int
    parts: int
    group: int
    groups: int


@dataclass(frozen=True, slots=True)
class _Scratch:
    """What the kernels hand to each other; the columns of restricted rows are empty unless they are needed."""

    score_SP: Tensor
    token_SP: Tensor
    logit_SP: Tensor
    top_SP: Tensor
    sum_SP: Tensor
    top_SG: Tensor
    list_SG: Tensor
    drawn_S: Tensor


def sample_rows(
    logits_SV: Tensor,
    row_S: Tensor,
    tables: SamplingTables,
    history: RowHistory,
    out_3S: Tensor,
    *,
    variant: Variant,
    max_model_len: int,
    logit_soft_cap: float | None = None,
) -> None:
    """As `ops.sample_rows`, for float16, bfloat16 and float32.

    Raises:
        ValueError: an argument is not laid out as the kernels read it.
    """
    _check(logits_SV, row_S, tables, history, out_3S)
    shape = _shape(logits_SV.shape[0], logits_SV.shape[1], TILES)
    if not shape.lines:
        return
    full = variant is Variant.FULL
    scratch = _scratch(shape, logits_SV.device, full=full)
    arguments = _Arguments(logits_SV, row_S, tables, history, logit_soft_cap)
    _scan(scratch, shape, arguments, variant)
    if full:
        _restrict(scratch, shape, arguments)
    num_stop = tables.stop_ids.shape[1]
    _finish_kernel[(shape.lines,)](
        out_3S,
        out_3S.stride(0),
        scratch.drawn_S,
        scratch.score_SP,
        scratch.token_SP,
        row_S,
        history.tokens_RM,
        history.tokens_RM.stride(0),
        history.lengths_R,
        arguments.finished_R,
        tables.wholes,
        tables.stop_ids,
        tables.stop_finish,
        num_stop,
        arguments.seen,
        max_model_len,
        V=shape.vocab_size,
        PARTS=shape.parts,
        PARTS_PAD=next_power_of_2(shape.parts),
        STOP_TILE=_STOP_TILE,
        FULL=full,
        num_warps=1,
        enable_fp_fusion=False,
    )


class _Arguments:
    """The arguments that scan and restrict share."""

    def __init__(
        self,
        logits_SV: Tensor,
        row_S: Tensor,
        tables: SamplingTables,
        history: RowHistory,
        logit_soft_cap: float | None,
    ) -> None:
        self.finished_R = history.finished_R.view(torch.uint8)
        self.seen = history.lengths_R if tables.seen is None else tables.seen  # unread if None
        self.has_soft_cap = logit_soft_cap is not None
        self.columns = (
            logits_SV,
            logits_SV.stride(0),
            row_S,
            history.lengths_R,
            self.finished_R,
            tables.reals,
            tables.wholes,
            tables.stop_ids,
            tables.stop_ids.shape[1],
            tables.allowed_bits,
            tables.allowed_bits.shape[1],
            tables.bias_ids,
            tables.bias_values,
            tables.bias_ids.shape[1],
            tables.bad_words,
            tables.bad_words.shape[1],
            tables.bad_words.shape[2],
            self.seen,
            history.tokens_RM,
            history.tokens_RM.stride(0),
            1.0 if logit_soft_cap is None else logit_soft_cap,
        )


def _scan(scratch: _Scratch, shape: _Shape, arguments: _Arguments, variant: Variant) -> None:
    _scan_kernel[(shape.parts, shape.lines)](
        scratch.score_SP,
        scratch.token_SP,
        scratch.logit_SP,
        scratch.top_SP,
        scratch.sum_SP,
        scratch.top_SG,
        *arguments.columns,
        V=shape.vocab_size,
        PARTS=shape.parts,
        GROUPS=shape.groups,
        GROUP=shape.group,
        BLOCK=TILES.scan,
        DRAW=variant is not Variant.GREEDY,
        FULL=variant is Variant.FULL,
        SOFT_CAP=arguments.has_soft_cap,
        num_warps=TILES.scan_warps,
        enable_fp_fusion=False,
    )


def _restrict(scratch: _Scratch, shape: _Shape, arguments: _Arguments) -> None:
    _restrict_kernel[(shape.lines,)](
        scratch.drawn_S,
        scratch.list_SG,
        scratch.score_SP,
        scratch.token_SP,
        scratch.logit_SP,
        scratch.top_SP,
        scratch.sum_SP,
        scratch.top_SG,
        *arguments.columns,
        V=shape.vocab_size,
        PARTS=shape.parts,
        PARTS_PAD=next_power_of_2(shape.parts),
        GROUPS=shape.groups,
        GROUPS_PAD=next_power_of_2(shape.groups),
        GROUP=shape.group,
        TILE=TILES.restrict,
        SOFT_CAP=arguments.has_soft_cap,
        num_warps=TILES.restrict_warps,
        enable_fp_fusion=False,
    )


def _shape(lines: int, vocab_size: int, tiles: Tiles) -> _Shape:
    group = max(tiles.group, next_power_of_2(-(-vocab_size // _MAX_GROUPS)))
    return _Shape(
        lines=lines,
        vocab_size=vocab_size,
        parts=-(-vocab_size // tiles.scan),
        group=group,
        groups=-(-vocab_size // group),
    )


def _scratch(shape: _Shape, device: torch.device, *, full: bool) -> _Scratch:
    def column(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((shape.lines, count), dtype=dtype, device=device)

    parts, groups = shape.parts, shape.groups
    score_SP, token_SP = column(parts, torch.float32), column(parts, torch.int32)
    if not full:
        return _Scratch(score_SP, token_SP, *(score_SP,) * 4, token_SP, token_SP)
    return _Scratch(
        score_SP,
        token_SP,
        logit_SP=column(parts, torch.float32),
        top_SP=column(parts, torch.float32),
        sum_SP=column(parts, torch.float32),
        top_SG=column(groups, torch.float32),
        list_SG=column(groups, torch.int32),
        drawn_S=column(1, torch.int32),
    )


def _check(
    logits_SV: Tensor, row_S: Tensor, tables: SamplingTables, history: RowHistory, out_3S: Tensor
) -> None:
    lines = logits_SV.shape[0]
    if logits_SV.stride(1) != 1:
        raise ValueError("logits_SV: tokens must be contiguous; call contiguous() on it")
    if row_S.shape != (lines,) or row_S.dtype != torch.int32 or not row_S.is_contiguous():
        raise ValueError(f"row_S: expected {lines} contiguous int32, got {row_S.dtype} {tuple(row_S.shape)}")
    if out_3S.shape[0] < 3 or out_3S.shape[1] < lines or out_3S.dtype != torch.int32 or out_3S.stride(1) != 1:
        raise ValueError(f"out_3S: expected int32 (3, {lines}), got {out_3S.dtype} {tuple(out_3S.shape)}")
    if tables.seen is not None and tables.seen.shape[1] != logits_SV.shape[1]:
        raise ValueError(
            f"logits_SV has {logits_SV.shape[1]} tokens, but tables.seen counts {tables.seen.shape[1]}"
        )
    if history.tokens_RM.stride(1) != 1 or history.tokens_RM.dtype != torch.int32:
        raise ValueError("history.tokens_RM: expected int32 with contiguous tokens")
