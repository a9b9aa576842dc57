"""What the worker knows of each row's sampling: parameters, stop ids, counts; and what a batch needs of it.

The state lives in device tensors by row. It changes when a request enters a row (`admit`, `release`); the one
part that changes with every step is the counts of the rows with penalties, and the device does that itself.
`plan` gathers a batch's columns and picks its variant and stages from host counters; its result serves every
step until the batch or one of its requests changes, so that a steady step looks at no row on the host.
Histories and lengths belong to the model runner. How logits change and tokens are drawn: `tercet.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.errors import ValidationError
from tercet.ipc.messages import Finish, Sampling
from tercet.ops.logits import unpack_bits
from tercet.ops.noise import split_seed
from tercet.ops.sample_rows import EDITS, RealColumn, RowFeature, SamplingTables, Variant, WholeColumn
from tercet.ops.sampling import UNBOUNDED, RowParams
from tercet.worker_proc.patches import Patches
from tercet.worker_proc.row_table import RowTable, upload

# Below this a temperature is greedy: dividing by it would overflow.
MIN_TEMPERATURE = 1e-5
# Bounds of one request, since a row's columns are as wide as the widest request needs.
MAX_STOP_IDS = 1024
MAX_LOGIT_BIAS = 4096
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 128
_TABLES = tuple(field.name for field in fields(SamplingTables))


@dataclass(frozen=True, slots=True)
class Subset:
    """The lines of a batch that a stage concerns."""

    position_b: Tensor  # i64, lines of the batch
    row_b: Tensor  # i64, rows of the state
    whole: bool  # all lines of the batch, in order


@dataclass(frozen=True, slots=True)
class StopIds:
    """Tokens that end each row of the batch, and how."""

    ids_BK: Tensor  # i32, -1 where there is none
    finish_BK: Tensor  # u8: Finish.EOS or Finish.STOP_TOKEN


@dataclass(frozen=True, slots=True)
class MinTokens:
    """Stop ids that are masked while a row has fewer than min_tokens outputs."""

    subset: Subset
    ids_bK: Tensor  # i32
    min_tokens_b1: Tensor  # i32


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """Tokens that a row must not draw because it names others."""

    subset: Subset
    banned_bV: Tensor  # bool


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Values added to single logits."""

    subset: Subset
    ids_bK: Tensor  # i32, -1 where there is none
    values_bK: Tensor  # f32


@dataclass(frozen=True, slots=True)
class Penalties:
    """Strengths; the counts stay in the state, since they change with every step."""

    subset: Subset
    repetition_b1: Tensor  # f32
    frequency_b1: Tensor  # f32
    presence_b1: Tensor  # f32


@dataclass(frozen=True, slots=True)
class BadWords:
    """Token sequences that must not appear in the output."""

    subset: Subset
    words_bNL: Tensor  # i32, backwards, padded with -1
    prompt_len_b: Tensor  # i32


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Lines of the batch that want log-probabilities."""

    subset: Subset
    rows: npt.NDArray[np.int32]  # the same rows, on the host
    k: int  # the most that one of them wants


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """What the sampler needs of B rows, on the device. Valid while `version` is the state's."""

    version: int
    variant: Variant
    row_B: Tensor  # i64
    params: RowParams
    seeds_2B1: Tensor  # i32
    prompt_len_B: Tensor  # i32
    max_tokens_B: Tensor  # i32
    stop: StopIds | None
    min_tokens: MinTokens | None
    allowed: AllowedTokens | None
    bias: LogitBias | None
    penalties: Penalties | None
    bad_words: BadWords | None
    logprobs: LogprobRows | None

    @property
    def changes_logits(self) -> bool:
        """Whether a stage writes to the logits before the draw."""
        stages = (self.min_tokens, self.allowed, self.bias, self.penalties, self.bad_words)
        return any(stage is not None for stage in stages)


class SamplingState:
    """Sampling state of `max_num_rows` rows.

    Args:
        max_num_rows: rows of the worker's batch.
        vocab_size: tokens that logits have.
        max_model_len: tokens at which a request ends.
        device: where the tensors live.
        patches: what writes lines of tables there; one of its own if None.

    The counts, int32[max_num_rows, vocab_size], are allocated with the first request that has penalties.
    """

    def __init__(
        self,
        max_num_rows: int,
        vocab_size: int,
        max_model_len: int,
        device: torch.device,
        patches: Patches | None = None,
    ) -> None:
        self.max_num_rows = max_num_rows
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.device = device
        self._patches = patches or Patches(device)
        self.version = 0
        self.seen: Tensor | None = None  # see apply_penalties
        self._is_live = np.zeros(max_num_rows, dtype=np.bool_)
        self._features = np.zeros(max_num_rows, dtype=np.uint16)
        self._logprobs = np.full(max_num_rows, -1, dtype=np.int32)
        self._reals = RowTable(max_num_rows, (len(RealColumn),), np.float32, 0, device, self._patches)
        self._wholes = RowTable(max_num_rows, (len(WholeColumn),), np.int32, 0, device, self._patches)
        self._stop_ids = RowTable(max_num_rows, (1,), np.int32, -1, device, self._patches)
        self._stop_finish = RowTable(max_num_rows, (1,), np.uint8, Finish.NONE, device, self._patches)
        self._allowed_bits = RowTable(max_num_rows, (0,), np.uint8, 0, device, self._patches)
        self._bias_ids = RowTable(max_num_rows, (0,), np.int32, -1, device, self._patches)
        self._bias_values = RowTable(max_num_rows, (0,), np.float32, 0, device, self._patches)
        self._bad_words = RowTable(max_num_rows, (0, 0), np.int32, -1, device, self._patches)
        self.layout_version = 0  # how often `tables` found one of them replaced, by a wider one
        self._tables: SamplingTables | None = None  # as of _tables_version
        self._tables_version = -1

    # ------------------------------------------------------------------------------------------
    # Requests come and go

    def admit(
        self, row: int, sampling: Sampling, seed: int, prompt_len: int, token_ids: npt.NDArray[np.int32]
    ) -> None:
        """A request enters a free row. All its state is rebuilt from the arguments, as for a resumed one.

        Args:
            row: 0 <= row < max_num_rows.
            sampling: how it samples, checked by the frontend and the core.
            seed: unsigned 64-bit.
            prompt_len: tokens of the prompt.
            token_ids: int32[prompt_len + outputs so far].

        Raises:
            ValueError: the row is out of range or taken, or prompt_len does not fit token_ids.
            ValidationError: a field of `sampling` cannot be held; the row stays free.
        """
        if not 0 <= row < self.max_num_rows:
            raise ValueError(f"row {row} is not below {self.max_num_rows}")
        if self._is_live[row]:
            raise ValueError(f"row {row} is taken: release it first")
        if not 0 < prompt_len <= len(token_ids):
            raise ValueError(f"prompt_len is {prompt_len}, but there are {len(token_ids)} token ids")
        self._check(sampling)
        features = _scalar_features(sampling)
        features |= self._admit_stop_ids(row, sampling, num_outputs=len(token_ids) - prompt_len)
        features |= self._admit_masks(row, sampling)
        if features & RowFeature.PENALTIES:
            self._admit_counts(row, prompt_len, token_ids)
        self._admit_scalars(row, sampling, features, seed, prompt_len)
        self._features[row] = features
        self._logprobs[row] = -1 if sampling.logprobs is None else min(sampling.logprobs, self.vocab_size)
        self._is_live[row] = True
        self.version += 1

    def release(self, row: int) -> None:
        """The request leaves its row. Releasing a free row does nothing.

        Raises:
            ValueError: the row is out of range.
        """
        if not 0 <= row < self.max_num_rows:
            raise ValueError(f"row {row} is not below {self.max_num_rows}")
        self._is_live[row] = False
        self._features[row] = 0
        self._logprobs[row] = -1
        self.version += 1

    def clear(self) -> None:
        """Release every row."""
        self._is_live[:] = False
        self._features[:] = 0
        self._logprobs[:] = -1
        self.version += 1

    def _check(self, sampling: Sampling) -> None:
        """Refuse what would index out of a tensor on the device or widen a table without bound."""
        for field, ids in (
            ("logit_bias", sampling.logit_bias_ids),
            ("allowed_token_ids", sampling.allowed_token_ids),
            ("eos_token_ids", sampling.eos_token_ids),
            ("stop_token_ids", sampling.stop_token_ids),
            *((f"bad_words[{i}]", word) for i, word in enumerate(sampling.bad_words)),
        ):
            _check_ids(field, ids, self.vocab_size)
        _check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOP_IDS)
        _check_count("eos_token_ids", len(sampling.eos_token_ids), MAX_STOP_IDS)
        _check_count("bad_words", len(sampling.bad_words), MAX_BAD_WORDS)
        for i, word in enumerate(sampling.bad_words):
            _check_count(f"bad_words[{i}]", len(word), MAX_BAD_WORD_TOKENS)
            if not word:
                raise ValidationError(f"bad_words[{i}]", "has no tokens; leave it out")
        if sampling.allowed_token_ids is not None and not len(sampling.allowed_token_ids):
            raise ValidationError("allowed_token_ids", "is empty; name a token or leave it out")
        if sampling.logit_bias_ids is not None:
            values = sampling.logit_bias_values
            _check_count("logit_bias", len(sampling.logit_bias_ids), MAX_LOGIT_BIAS)
            if values is None or len(values) != len(sampling.logit_bias_ids):
                raise ValidationError("logit_bias", "needs as many values as token ids")

    def _admit_scalars(
        self, row: int, sampling: Sampling, features: RowFeature, seed: int, prompt_len: int
    ) -> None:
        is_random = bool(features & RowFeature.RANDOM)
        self._reals.write(
            row,
            [
                1.0 / sampling.temperature if is_random else 1.0,
                float(is_random),
                sampling.top_p if is_random else 1.0,
                sampling.min_p if is_random else 0.0,
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            ],
        )
        low, high = split_seed(seed)
        top_k = UNBOUNDED if not 0 < sampling.top_k < self.vocab_size else sampling.top_k
        self._wholes.write(
            row,
            [
                low,
                high,
                top_k if is_random else 1,
                prompt_len,
                min(sampling.min_tokens, UNBOUNDED),
                min(sampling.max_tokens, UNBOUNDED),
                int(features),
            ],
        )

    def _admit_stop_ids(self, row: int, sampling: Sampling, num_outputs: int) -> RowFeature:
        # EOS comes first: a token that is both ends the row as EOS.
        finishes = dict.fromkeys(sampling.eos_token_ids, int(Finish.EOS))
        for token_id in sampling.stop_token_ids:
            finishes.setdefault(token_id, int(Finish.STOP_TOKEN))
        if not finishes:
            return RowFeature(0)
        self._stop_ids.write(row, list(finishes))
        self._stop_finish.write(row, list(finishes.values()))
        return RowFeature.STOP | (
            RowFeature.MIN_TOKENS if num_outputs < sampling.min_tokens else RowFeature(0)
        )

    def _admit_masks(self, row: int, sampling: Sampling) -> RowFeature:
        features = RowFeature(0)
        if sampling.allowed_token_ids is not None:
            self._allowed_bits.write(row, _pack_bits(sampling.allowed_token_ids, self.vocab_size))
            features |= RowFeature.ALLOWED
        ids, values = sampling.logit_bias_ids, sampling.logit_bias_values
        if ids is not None and values is not None and len(ids):
            self._bias_ids.write(row, ids)
            self._bias_values.write(row, values)
            features |= RowFeature.BIAS
        if sampling.bad_words:
            longest = max(map(len, sampling.bad_words))
            self._bad_words.write(
                row, [word[::-1] + [-1] * (longest - len(word)) for word in sampling.bad_words]
            )
            features |= RowFeature.BAD_WORDS
        return features

    def _admit_counts(self, row: int, prompt_len: int, token_ids: npt.NDArray[np.int32]) -> None:
        _check_ids("token_ids", token_ids, self.vocab_size)
        if self.seen is None:
            self.seen = torch.zeros(self.max_num_rows, self.vocab_size, dtype=torch.int32, device=self.device)
        ids = upload(np.array(token_ids, dtype=np.int64), self.device)
        seen_V = self.seen[row].zero_()
        seen_V.index_fill_(0, ids[:prompt_len], 1)
        seen_V.index_add_(0, ids[prompt_len:], torch.full_like(ids[prompt_len:], 2, dtype=torch.int32))

    # ------------------------------------------------------------------------------------------
    # Steps

    def plan(self, rows: npt.NDArray[np.int32]) -> SampleBatch:
        """What the sampler needs of these rows; to be made anew when `version` or the batch changes.

        Args:
            rows: int[B], B >= 1, live rows in the order of the logits.

        Raises:
            ValueError: there are no rows, or one of them is free.
        """
        if not len(rows) or not self._is_live[rows].all():
            raise ValueError(f"plan: expected live rows, got {rows!r}")
        self.tables()
        features = self._features[rows]
        row_B = upload(np.array(rows, dtype=np.int64), self.device)
        reals = self._reals.device_table().index_select(0, row_B)
        wholes = self._wholes.device_table().index_select(0, row_B)
        return SampleBatch(
            version=self.version,
            variant=_variant(features),
            row_B=row_B,
            params=_row_params(reals, wholes, all_random=bool((features & RowFeature.RANDOM).all())),
            seeds_2B1=wholes[:, : WholeColumn.SEED_HIGH + 1].T.unsqueeze(-1).contiguous(),
            prompt_len_B=wholes[:, WholeColumn.PROMPT_LEN].contiguous(),
            max_tokens_B=wholes[:, WholeColumn.MAX_TOKENS].contiguous(),
            stop=self._plan_stop(features, row_B),
            min_tokens=self._plan_min_tokens(features, rows, wholes),
            allowed=self._plan_allowed(features, rows),
            bias=self._plan_bias(features, rows),
            penalties=self._plan_penalties(features, rows, reals),
            bad_words=self._plan_bad_words(features, rows, wholes),
            logprobs=self.plan_logprobs(rows),
        )

    def count_tokens(self, penalties: Penalties, token_B: Tensor, is_active_B: Tensor) -> None:
        """Count the tokens just drawn by the rows with penalties; no change where `is_active_B` is False."""
        assert self.seen is not None
        token_b = token_B.index_select(0, penalties.subset.position_b)
        twice_b = is_active_B.index_select(0, penalties.subset.position_b).int() * 2
        self.seen.view(-1).scatter_add_(0, penalties.subset.row_b * self.vocab_size + token_b, twice_b)

    def tables(self) -> SamplingTables:
        """All rows on the device, up to date with every request so far, for `ops.sample_rows`.

        What has captured the tensors' addresses goes on with the rows of today if this was called since they
        changed and `layout_version` is still what it was.
        """
        known = self._tables
        if known is not None and self._tables_version == self.version:
            return known
        made = SamplingTables(
            reals=self._reals.device_table(),
            wholes=self._wholes.device_table(),
            stop_ids=self._stop_ids.device_table(),
            stop_finish=self._stop_finish.device_table(),
            allowed_bits=self._allowed_bits.device_table(),
            bias_ids=self._bias_ids.device_table(),
            bias_values=self._bias_values.device_table(),
            bad_words=self._bad_words.device_table(),
            seen=self.seen,
        )
        self._patches.flush()
        self._tables_version = self.version
        if known is None or any(getattr(made, name) is not getattr(known, name) for name in _TABLES):
            self._tables = known = made
            self.layout_version += 1
        return known

    def variant(self, rows: npt.NDArray[np.int32]) -> Variant:
        """The variant of `ops.sample_rows` that serves these rows: FULL also where one edits its logits."""
        features = self._features[rows]
        if (int(np.bitwise_or.reduce(features)) if len(features) else 0) & EDITS:
            return Variant.FULL
        return _variant(features)

    def _subset(
        self, features: npt.NDArray[np.uint16], feature: RowFeature, rows: npt.NDArray[np.int32]
    ) -> Subset | None:
        return self._subset_where((features & feature) != 0, rows)

    def _subset_where(self, mask: npt.NDArray[np.bool_], rows: npt.NDArray[np.int32]) -> Subset | None:
        positions = np.flatnonzero(mask)
        if not len(positions):
            return None
        return Subset(
            position_b=upload(positions.astype(np.int64), self.device),
            row_b=upload(rows[positions].astype(np.int64), self.device),
            whole=len(positions) == len(rows),
        )

    def _plan_stop(self, features: npt.NDArray[np.uint16], row_B: Tensor) -> StopIds | None:
        # A row without stop ids has the table's padding only if none was written: its ids must not count.
        has_stop = (features & RowFeature.STOP) != 0
        if not has_stop.any():
            return None
        ids = self._stop_ids.device_table().index_select(0, row_B)
        if not has_stop.all():
            ids = ids.masked_fill_(upload(~has_stop, self.device).unsqueeze(1), -1)
        return StopIds(ids, self._stop_finish.device_table().index_select(0, row_B))

    def _plan_min_tokens(
        self, features: npt.NDArray[np.uint16], rows: npt.NDArray[np.int32], wholes: Tensor
    ) -> MinTokens | None:
        if (subset := self._subset(features, RowFeature.MIN_TOKENS, rows)) is None:
            return None
        return MinTokens(
            subset=subset,
            ids_bK=self._stop_ids.device_table().index_select(0, subset.row_b),
            min_tokens_b1=wholes[:, WholeColumn.MIN_TOKENS, None].index_select(0, subset.position_b),
        )

    def _plan_allowed(
        self, features: npt.NDArray[np.uint16], rows: npt.NDArray[np.int32]
    ) -> AllowedTokens | None:
        if (subset := self._subset(features, RowFeature.ALLOWED, rows)) is None:
            return None
        bits = self._allowed_bits.device_table().index_select(0, subset.row_b)
        return AllowedTokens(subset, unpack_bits(bits, self.vocab_size).logical_not_())

    def _plan_bias(self, features: npt.NDArray[np.uint16], rows: npt.NDArray[np.int32]) -> LogitBias | None:
        if (subset := self._subset(features, RowFeature.BIAS, rows)) is None:
            return None
        return LogitBias(
            subset=subset,
            ids_bK=self._bias_ids.device_table().index_select(0, subset.row_b),
            values_bK=self._bias_values.device_table().index_select(0, subset.row_b),
        )

    def _plan_penalties(
        self, features: npt.NDArray[np.uint16], rows: npt.NDArray[np.int32], reals: Tensor
    ) -> Penalties | None:
        if (subset := self._subset(features, RowFeature.PENALTIES, rows)) is None:
            return None
        reals_b = reals.index_select(0, subset.position_b)
        return Penalties(
            subset=subset,
            repetition_b1=reals_b[:, RealColumn.REPETITION, None],
            frequency_b1=reals_b[:, RealColumn.FREQUENCY, None],
            presence_b1=reals_b[:, RealColumn.PRESENCE, None],
        )

    def _plan_bad_words(
        self, features: npt.NDArray[np.uint16], rows: npt.NDArray[np.int32], wholes: Tensor
    ) -> BadWords | None:
        if (subset := self._subset(features, RowFeature.BAD_WORDS, rows)) is None:
            return None
        return BadWords(
            subset=subset,
            words_bNL=self._bad_words.device_table().index_select(0, subset.row_b),
            prompt_len_b=wholes[:, WholeColumn.PROMPT_LEN].index_select(0, subset.position_b),
        )

    def plan_logprobs(self, rows: npt.NDArray[np.int32]) -> LogprobRows | None:
        """Which of these rows want log-probabilities, and how many; None if none does."""
        k = self._logprobs[rows]
        if (subset := self._subset_where(k >= 0, rows)) is None:
            return None
        return LogprobRows(subset, rows=rows[k >= 0].astype(np.int32), k=int(k.max()))


def _scalar_features(sampling: Sampling) -> RowFeature:
    """Features that follow from the numbers alone."""
    features = RowFeature(0)
    # The best token is all that top_k = 1 leaves, whatever the temperature.
    if sampling.temperature >= MIN_TEMPERATURE and sampling.top_k != 1:
        features |= RowFeature.RANDOM
        if sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0:
            features |= RowFeature.RESTRICTED
    penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
    if penalties != (1, 0, 0):
        features |= RowFeature.PENALTIES
    return features


def _variant(features: npt.NDArray[np.uint16]) -> Variant:
    union = int(np.bitwise_or.reduce(features)) if len(features) else 0
    if union & RowFeature.RESTRICTED:
        return Variant.FULL
    return Variant.TEMPERATURE if union & RowFeature.RANDOM else Variant.GREEDY


def _row_params(reals: Tensor, wholes: Tensor, *, all_random: bool) -> RowParams:
    return RowParams(
        inv_temperature_B1=reals[:, RealColumn.INV_TEMPERATURE, None].contiguous(),
        is_random_B1=None if all_random else reals[:, RealColumn.IS_RANDOM, None].contiguous(),
        top_k_B1=wholes[:, WholeColumn.TOP_K, None].contiguous(),
        top_p_B1=reals[:, RealColumn.TOP_P, None].contiguous(),
        min_p_B1=reals[:, RealColumn.MIN_P, None].contiguous(),
    )


def _pack_bits(token_ids: npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.uint8]:
    """uint8[ceil(vocab_size / 8)]: bit t % 8 of byte t // 8 is set for each token t."""
    bits = np.zeros(vocab_size, dtype=np.bool_)
    bits[token_ids] = True
    return np.packbits(bits, bitorder="little")


def _check_ids(field: str, ids: npt.NDArray[np.int32] | Sequence[int] | None, vocab_size: int) -> None:
    if ids is None or not len(ids):
        return
    low, high = int(np.min(ids)), int(np.max(ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValidationError(field, f"token id {wrong} is not in the vocabulary of {vocab_size} tokens")


def _check_count(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise ValidationError(field, f"has {count} entries; at most {limit} are allowed")
