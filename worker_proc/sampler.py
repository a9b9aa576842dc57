"""From logits to tokens, for a whole batch at once and without waiting for the device.

Order of the stages (vLLM's): raw log-probabilities, allowed_token_ids, logit_bias, min_tokens, penalties,
bad_words, then argmax for greedy rows, else temperature, min_p, top_k, top_p and the draw. Finish and the
counts for penalties follow on the device. Lines of a batch never look at each other; a line with broken
logits is marked and leaves the rest alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.ipc.messages import Finish
from tercet.ops import logits as logit_ops
from tercet.ops.logprobs import LogprobColumns, gather_logprobs
from tercet.ops.noise import DrawKind, noise_keys
from tercet.ops.sample_rows import RowHistory, Variant, sample_rows
from tercet.ops.sampling import argmax, gumbel_argmax, sample_restricted
from tercet.worker_proc.device_batch import DeviceBatch
from tercet.worker_proc.sampling_state import LogprobRows, SampleBatch, SamplingState, StopIds, Subset

_NOT_FINISHED = 255  # above every Finish, so that the least code wins: EOS, then STOP_TOKEN, then LENGTH


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of the rows that want them, from the logits as the model gave them."""

    rows: npt.NDArray[np.int32]  # on the host, in the order of the columns
    position_b: Tensor  # i64, lines of the batch
    columns: LogprobColumns


@dataclass(frozen=True, slots=True)
class SampleResult:
    """One step's outcome for B rows, on the device."""

    token_B: Tensor  # i32, always in the vocabulary; void where finish is ERROR and for frozen rows
    finish_B: Tensor  # u8, Finish; NONE for frozen rows
    bad_B: Tensor  # bool: logits with NaN or +inf, or every token masked; finish is ERROR
    logprobs: LogprobTensors | None


@dataclass(frozen=True, slots=True)
class DrawPlan:
    """How the rows of a batch are drawn from; valid until they or their requests change."""

    variant: Variant
    logprobs: LogprobRows | None


class FusedSampler:
    """Draws the next tokens and advances their rows in a few launches, which can be captured.

    What `Sampler` and `DeviceBatch.append` do together, by `ops.sample_rows`: rows are looked up on the device.

    Args:
        state: the rows' sampling state.
        logit_soft_cap: as `ops.sample_rows` takes it.
    """

    def __init__(self, state: SamplingState, logit_soft_cap: float | None = None) -> None:
        self._state = state
        self._logit_soft_cap = logit_soft_cap

    @property
    def version(self) -> int:
        """Changes when a request comes or goes: `plan` anew."""
        return self._state.version

    @property
    def layout_version(self) -> int:
        """Changes, in `plan` or `draw`, when a table moves: what was captured before must not be replayed."""
        return self._state.layout_version

    def plan(self, rows: npt.NDArray[np.int32]) -> DrawPlan:
        """Bring the device's tables up to date, and say how to draw for these rows.

        Args:
            rows: int32[B], live rows in the order of the logits.
        """
        self._state.tables()
        return DrawPlan(self._state.variant(rows), self._state.plan_logprobs(rows))

    def draw(
        self, logits_SV: Tensor, row_S: Tensor, batch: DeviceBatch, out_3S: Tensor, variant: Variant
    ) -> None:
        """Draw one token for each line's row and advance the row; see `ops.sample_rows`.

        Args:
            logits_SV: [S, V] as the model's head gives them; not changed.
            row_S: [S] int32, -1 for padding lines.
            batch: its histories, lengths and finished rows are advanced.
            out_3S: [3 or more, S or more] int32, written: token, finish, 1 for a broken row.
            variant: of a plan for these rows.
        """
        history = RowHistory(batch.history_RM, batch.lengths_R, batch.finished_R)
        sample_rows(
            logits_SV,
            row_S,
            self._state.tables(),
            history,
            out_3S,
            variant=variant,
            max_model_len=self._state.max_model_len,
            logit_soft_cap=self._logit_soft_cap,
        )


class Sampler:
    """Draws the next token of each row of a batch.

    Args:
        state: the rows' sampling state; the sampler keeps the penalty counts in it up to date.
    """

    def __init__(self, state: SamplingState) -> None:
        self._state = state

    def __call__(
        self,
        logits_BV: Tensor,
        batch: SampleBatch,
        history_RM: Tensor,
        lengths_R: Tensor,
        frozen_B: Tensor | None = None,
    ) -> SampleResult:
        """Draw one token for each row.

        Args:
            logits_BV: [B, vocab_size] float32, contiguous. Used as scratch: its contents are lost.
            batch: from `SamplingState.plan`, for the rows in the order of the logits.
            history_RM: [max_num_rows, max_model_len] int32, prompt and outputs of each row.
            lengths_R: [max_num_rows] int32, tokens known of each row, without the one drawn now.
            frozen_B: [B] bool, rows that finished in a step still in flight: nothing of them changes.

        Raises:
            ValueError: a request was admitted or released since `batch` was planned.
        """
        if batch.version != self._state.version:
            raise ValueError("requests came or went since this batch was planned: call plan() again")
        length_B = lengths_R.index_select(0, batch.row_B)
        position_B = length_B - batch.prompt_len_B
        raw_logits = _raw_logits(logits_BV, batch)
        self._process(logits_BV, batch, history_RM, length_B, position_B)
        token_B, value_B = _choose(logits_BV, batch, position_B)
        bad_B = ~torch.isfinite(value_B)
        finish_B = self._finish(token_B, batch, length_B, position_B).masked_fill_(bad_B, int(Finish.ERROR))
        if frozen_B is not None:
            finish_B.masked_fill_(frozen_B, int(Finish.NONE))
            bad_B.logical_and_(~frozen_B)
        if batch.penalties is not None:
            is_active_B = ~bad_B if frozen_B is None else ~(bad_B | frozen_B)
            self._state.count_tokens(batch.penalties, token_B, is_active_B)
        return SampleResult(token_B.int(), finish_B, bad_B, _logprobs(raw_logits, batch, token_B))

    def _process(
        self, logits_BV: Tensor, batch: SampleBatch, history_RM: Tensor, length_B: Tensor, position_B: Tensor
    ) -> None:
        """Every stage before the draw, in place."""
        if (allowed := batch.allowed) is not None:
            _edit_rows(logits_BV, allowed.subset, lambda x: x.masked_fill_(allowed.banned_bV, -torch.inf))
        if (bias := batch.bias) is not None:
            logit_ops.add_at(logits_BV, bias.subset.position_b, bias.ids_bK, bias.values_bK)
        if (least := batch.min_tokens) is not None:
            is_early_b1 = position_B.index_select(0, least.subset.position_b)[:, None] < least.min_tokens_b1
            logit_ops.mask_at(
                logits_BV, least.subset.position_b, least.ids_bK, is_early_b1.expand_as(least.ids_bK)
            )
        if (penalties := batch.penalties) is not None:
            assert self._state.seen is not None
            seen_bV = self._state.seen.index_select(0, penalties.subset.row_b)
            strengths = (penalties.repetition_b1, penalties.frequency_b1, penalties.presence_b1)
            _edit_rows(
                logits_BV, penalties.subset, lambda x: logit_ops.apply_penalties(x, seen_bV, *strengths)
            )
        if (words := batch.bad_words) is not None:
            subset = words.subset
            length_b = length_B.index_select(0, subset.position_b)
            completed_bN = logit_ops.match_bad_words(
                words.words_bNL, history_RM, subset.row_b, length_b, words.prompt_len_b
            )
            logit_ops.mask_at(logits_BV, subset.position_b, words.words_bNL[:, :, 0], completed_bN)

    def _finish(self, token_B: Tensor, batch: SampleBatch, length_B: Tensor, position_B: Tensor) -> Tensor:
        """[B] uint8: how each row ends with this token, if it does."""
        is_full_B = (position_B + 1 >= batch.max_tokens_B) | (length_B + 1 >= self._state.max_model_len)
        code_B = torch.full_like(token_B, _NOT_FINISHED, dtype=torch.uint8)
        code_B.masked_fill_(is_full_B, int(Finish.LENGTH))
        if batch.stop is not None:
            # min_tokens needs no look here: it has masked these tokens.
            code_B = torch.minimum(code_B, _stop_code(token_B, batch.stop))
        return code_B.masked_fill_(code_B == _NOT_FINISHED, int(Finish.NONE))


def _raw_logits(logits_BV: Tensor, batch: SampleBatch) -> Tensor | None:
    """The logits that log-probabilities are of; a copy if a later stage would change them."""
    if batch.logprobs is None:
        return None
    if batch.logprobs.subset.whole and not batch.changes_logits:
        return logits_BV
    return logits_BV.index_select(0, batch.logprobs.subset.position_b)


def _choose(logits_BV: Tensor, batch: SampleBatch, position_B: Tensor) -> tuple[Tensor, Tensor]:
    """The draw: (token_B int64, value_B), the latter finite unless the row is broken."""
    if batch.variant is Variant.GREEDY:
        return argmax(logits_BV)
    keys_2B1 = noise_keys(batch.seeds_2B1, position_B, DrawKind.TOKEN)
    if batch.variant is Variant.TEMPERATURE:
        return gumbel_argmax(logits_BV, batch.params, keys_2B1)
    return sample_restricted(logits_BV, batch.params, keys_2B1)


def _stop_code(token_B: Tensor, stop: StopIds) -> Tensor:
    """[B] uint8: EOS or STOP_TOKEN where the token is one, else above every Finish."""
    is_other_BK = stop.ids_BK != token_B.unsqueeze(1)
    return stop.finish_BK.masked_fill(is_other_BK, _NOT_FINISHED).amin(dim=1)


def _logprobs(raw_logits: Tensor | None, batch: SampleBatch, token_B: Tensor) -> LogprobTensors | None:
    if raw_logits is None or batch.logprobs is None:
        return None
    position_b = batch.logprobs.subset.position_b
    columns = gather_logprobs(raw_logits, token_B.index_select(0, position_b), batch.logprobs.k)
    return LogprobTensors(batch.logprobs.rows, position_b, columns)


def _edit_rows(logits_BV: Tensor, subset: Subset, edit: Callable[[Tensor], object]) -> None:
    """Apply an in-place change to some lines of the batch."""
    if subset.whole:
        edit(logits_BV)
        return
    lines = logits_BV.index_select(0, subset.position_b)
    edit(lines)
    logits_BV.index_copy_(0, subset.position_b, lines)
