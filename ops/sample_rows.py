"""From a model's logits to tokens for lines of a batch, everything looked up by row on the device.

One call edits the logits, draws, decides how rows finish and advances their state, in a number of launches that
depends on the variant alone, so that it can be captured in a CUDA graph. Owns the layout of the tables by row;
who fills them is not its business. Log-probabilities are not here either: the logits stay as they were.

Dimensions: S lines (padded), R rows, V vocabulary, M history, K entries of a row, W bytes of bits, N words,
L tokens of a word.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops import logits as logit_ops
from tercet.ops.noise import DrawKind, noise_keys
from tercet.ops.registry import operation
from tercet.ops.sampling import RowParams, argmax, gumbel_argmax, sample_restricted
from tercet.ops.triton_support import TRITON, on_cuda

# How a row ends, as `Finish` numbers it (a test compares them).
FINISH_NONE = 0
FINISH_LENGTH = 3
FINISH_ERROR = 5
_NOT_FINISHED = 255  # above every finish, so that the least wins: EOS, then stop token, then length


class Variant(enum.IntEnum):
    """What a batch needs of the sampler: that of its most demanding row."""

    GREEDY = 0  # argmax
    TEMPERATURE = 1  # no row restricts its tokens
    FULL = 2  # top-k, top-p or min-p


class RowFeature(enum.IntFlag):
    """What a row uses; a bit set in column FEATURES of the integers."""

    RANDOM = 1
    RESTRICTED = 2
    STOP = 4
    MIN_TOKENS = 8
    ALLOWED = 16
    BIAS = 32
    PENALTIES = 64
    BAD_WORDS = 128


EDITS = (
    RowFeature.MIN_TOKENS | RowFeature.ALLOWED | RowFeature.BIAS | RowFeature.PENALTIES | RowFeature.BAD_WORDS
)


class RealColumn(enum.IntEnum):
    """Columns of `SamplingTables.reals`."""

    INV_TEMPERATURE = 0
    IS_RANDOM = 1
    TOP_P = 2
    MIN_P = 3
    REPETITION = 4
    FREQUENCY = 5
    PRESENCE = 6


class WholeColumn(enum.IntEnum):
    """Columns of `SamplingTables.wholes`."""

    SEED_LOW = 0
    SEED_HIGH = 1
    TOP_K = 2
    PROMPT_LEN = 3
    MIN_TOKENS = 4
    MAX_TOKENS = 5
    FEATURES = 6


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """How each row samples, contiguous on the device. A list is void where its row lacks the feature's bit.

    Attributes:
        reals: f32 [R, 7], columns as RealColumn.
        wholes: i32 [R, 7], columns as WholeColumn.
        stop_ids: i32 [R, K], the entries first, then -1; as are all lists of ids.
        stop_finish: u8 [R, K], finish of each stop id.
        allowed_bits: u8 [R, W], bit t % 8 of byte t // 8 for token t.
        bias_ids, bias_values: i32, f32 [R, K]; the values of equal ids add up.
        bad_words: i32 [R, N, L], each backwards: last token first.
        seen: i32 [R, V], twice the times in the output, plus 1 if in the prompt; None if no row has penalties.
    """

    reals: Tensor
    wholes: Tensor
    stop_ids: Tensor
    stop_finish: Tensor
    allowed_bits: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    bad_words: Tensor
    seen: Tensor | None


@dataclass(frozen=True, slots=True)
class RowHistory:
    """What the device knows of each row's tokens; advanced in place.

    Attributes:
        tokens_RM: i32 [R, M], prompt and output; M is at least max_model_len.
        lengths_R: i32 [R], tokens known.
        finished_R: bool [R]; nothing of a finished row changes.
    """

    tokens_RM: Tensor
    lengths_R: Tensor
    finished_R: Tensor


@operation("sample_rows")
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
    """Draw the next token of each line's row, and advance the row by it.

    Stages: allowed tokens, bias, min_tokens, penalties, bad words; then argmax, or the draw as `ops.sampling`
    defines it. A row whose edited logits hold a NaN or +inf, or nothing but -inf, finishes with FINISH_ERROR. A
    line's outcome depends on its row alone: not on S, on its neighbours, or on the variant among those that
    serve it.

    Args:
        logits_SV: [S, V] bfloat16, float16 or float32, last dimension contiguous; not changed.
        row_S: [S] int32, no row twice; -1 for a padding line.
        tables: of all rows; `seen` of the rows with penalties gets the token.
        history: of all rows; the rows drawn get their token, one more of length and whether they finished.
        out_3S: [3 or more, S or more] int32, lines contiguous; of each of S lines is written: token (0 for a broken
            row), finish, 1 for a broken row. All 0 for padding lines and for rows that had finished.
        variant: GREEDY serves greedy rows without edits, TEMPERATURE any without restrictions and edits.
        max_model_len: length at which a row finishes.
        logit_soft_cap: logits become cap * tanh(logit / cap) before anything else.

    The reference waits for the device; the kernels do not.

    Sources: `ops.sampling`, `ops.logits` and `ops.noise` name theirs.
    """
    out_3S = out_3S[:3, : len(row_S)]
    out_3S.zero_()
    line_b = ((row_S >= 0) & ~history.finished_R[row_S.clamp(min=0).long()]).nonzero().squeeze(1)
    if not line_b.numel():
        return
    row_b = row_S[line_b].long()
    logits_bV = logits_SV[line_b].float()
    if logit_soft_cap is not None:
        logits_bV = torch.tanh(logits_bV / logit_soft_cap) * logit_soft_cap
    wholes_b, reals_b = tables.wholes[row_b], tables.reals[row_b]
    length_b = history.lengths_R[row_b]
    position_b = length_b - wholes_b[:, WholeColumn.PROMPT_LEN]
    if variant is Variant.FULL:
        _edit(logits_bV, row_b, tables, history)
    token_b, value_b = _choose(logits_bV, wholes_b, reals_b, position_b, variant)
    is_bad_b = ~torch.isfinite(value_b)
    token_b = token_b.masked_fill(is_bad_b, 0).int()
    is_full_b = (position_b + 1 >= wholes_b[:, WholeColumn.MAX_TOKENS]) | (length_b + 1 >= max_model_len)
    finish_b = _stop_code(token_b, row_b, tables).clamp_(max=_NOT_FINISHED)
    finish_b = torch.minimum(finish_b, torch.where(is_full_b, FINISH_LENGTH, _NOT_FINISHED))
    finish_b = torch.where(finish_b == _NOT_FINISHED, FINISH_NONE, finish_b)
    finish_b = torch.where(is_bad_b, FINISH_ERROR, finish_b)
    out_3S[:, line_b] = torch.stack((token_b, finish_b.int(), is_bad_b.int()))
    history.tokens_RM[row_b, length_b.long()] = token_b
    history.lengths_R[row_b] = length_b + 1
    history.finished_R[row_b] = finish_b != FINISH_NONE
    if tables.seen is not None:
        counted_b = ~is_bad_b & _has(wholes_b, RowFeature.PENALTIES)
        tables.seen[row_b[counted_b], token_b[counted_b].long()] += 2


sample_rows.kernel(TRITON, "tercet.ops.triton_sampling", supports=on_cuda)


def _has(wholes_b: Tensor, feature: RowFeature) -> Tensor:
    return (wholes_b[:, WholeColumn.FEATURES] & int(feature)) != 0


def _edit(logits_bV: Tensor, row_b: Tensor, tables: SamplingTables, history: RowHistory) -> None:
    """Every stage before the draw, in place, each on the rows that have it."""
    wholes_b = tables.wholes[row_b]
    prompt_len_b, length_b = wholes_b[:, WholeColumn.PROMPT_LEN], history.lengths_R[row_b]
    vocab_size = logits_bV.shape[1]
    if len(at := _lines(wholes_b, RowFeature.ALLOWED)):
        is_allowed = logit_ops.unpack_bits(tables.allowed_bits[row_b[at]], vocab_size)
        logits_bV[at] = logits_bV[at].masked_fill(~is_allowed, -torch.inf)
    if len(at := _lines(wholes_b, RowFeature.BIAS)):
        logit_ops.add_at(logits_bV, at, tables.bias_ids[row_b[at]], tables.bias_values[row_b[at]])
    if len(at := _lines(wholes_b, RowFeature.MIN_TOKENS)):
        ids_bK = tables.stop_ids[row_b[at]]
        is_early_b = (length_b - prompt_len_b)[at] < wholes_b[at, WholeColumn.MIN_TOKENS]
        logit_ops.mask_at(logits_bV, at, ids_bK, is_early_b[:, None].expand_as(ids_bK))
    if tables.seen is not None and len(at := _lines(wholes_b, RowFeature.PENALTIES)):
        lines, reals_b = logits_bV[at], tables.reals[row_b[at]]
        strengths = (RealColumn.REPETITION, RealColumn.FREQUENCY, RealColumn.PRESENCE)
        logit_ops.apply_penalties(
            lines, tables.seen[row_b[at]], *(reals_b[:, column, None] for column in strengths)
        )
        logits_bV[at] = lines
    if len(at := _lines(wholes_b, RowFeature.BAD_WORDS)):
        words_bNL = tables.bad_words[row_b[at]]
        is_completed_bN = logit_ops.match_bad_words(
            words_bNL, history.tokens_RM, row_b[at], length_b[at], prompt_len_b[at]
        )
        logit_ops.mask_at(logits_bV, at, words_bNL[:, :, 0], is_completed_bN)


def _lines(wholes_b: Tensor, feature: RowFeature) -> Tensor:
    """Indices of the lines whose rows have a feature."""
    return _has(wholes_b, feature).nonzero().squeeze(1)


def _choose(
    logits_bV: Tensor, wholes_b: Tensor, reals_b: Tensor, position_b: Tensor, variant: Variant
) -> tuple[Tensor, Tensor]:
    """The draw: (token_b int64, value_b), the latter finite unless the row is broken."""
    if variant is Variant.GREEDY:
        return argmax(logits_bV)

    def real(column: RealColumn) -> Tensor:
        return reals_b[:, column, None].contiguous()

    params = RowParams(
        inv_temperature_B1=real(RealColumn.INV_TEMPERATURE),
        is_random_B1=real(RealColumn.IS_RANDOM),
        top_k_B1=wholes_b[:, WholeColumn.TOP_K, None].contiguous(),
        top_p_B1=real(RealColumn.TOP_P),
        min_p_B1=real(RealColumn.MIN_P),
    )
    seeds_2B1 = wholes_b[:, : WholeColumn.SEED_HIGH + 1].T.unsqueeze(-1).contiguous()
    keys_2B1 = noise_keys(seeds_2B1, position_b, DrawKind.TOKEN)
    draw = gumbel_argmax if variant is Variant.TEMPERATURE else sample_restricted
    return draw(logits_bV, params, keys_2B1)


def _stop_code(token_b: Tensor, row_b: Tensor, tables: SamplingTables) -> Tensor:
    """[b] int32: the least finish of a row's stop ids that equal the token, else _NOT_FINISHED."""
    is_hit_bK = (tables.stop_ids[row_b] == token_b[:, None]) & _has(tables.wholes[row_b], RowFeature.STOP)[
        :, None
    ]
    return tables.stop_finish[row_b].int().masked_fill(~is_hit_bK, _NOT_FINISHED).amin(dim=1)
