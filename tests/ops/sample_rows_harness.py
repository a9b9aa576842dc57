"""Batches for tests of `sample_rows`: random rows, what the sampler and the batch make of them, what may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.ipc.messages import Sampling
from tercet.ops.sample_rows import RowHistory, SamplingTables, Variant
from tercet.worker_proc.device_batch import DeviceBatch
from tercet.worker_proc.sampler import Sampler
from tercet.worker_proc.sampling_state import SamplingState
from tests.ops import sampling_reference as reference
from tests.ops.sampling_reference import Row

NUM_ROWS = 24
MAX_LEN = 40
EOS = 2
GARBAGE = -77  # what an output holds before it is written
CPU = torch.device("cpu")
SampleRows = Callable[..., None]
Floats = npt.NDArray[np.float32]


def random_row(rng: np.random.Generator, vocab_size: int, *, edits: bool, restricted: bool) -> Row:
    """A request with a random choice of features."""

    def maybe(value: float, otherwise: float) -> float:
        return value if rng.random() < 0.5 else otherwise

    def tokens(low: int, high: int) -> list[int]:
        return [int(token) for token in rng.integers(0, vocab_size, int(rng.integers(low, high)))]

    row = Row(tokens(1, 6), tokens(0, 9), seed=int(rng.integers(0, 2**63)) * 2 + 1)
    row.temperature = float(rng.choice([0.0, 0.4, 1.0, 1.7]))
    row.stop = (EOS, *tokens(0, 35)) if rng.random() < 0.5 else ()
    if restricted:
        row.top_k = int(rng.choice([0, 1, 2, 7, 60, vocab_size + 1]))
        row.top_p = maybe(float(rng.uniform(0.05, 0.99)), 1.0)
        row.min_p = maybe(float(rng.uniform(0, 0.2)), 0.0)
    if edits:
        row.repetition, row.frequency = maybe(1.4, 1.0), maybe(-0.6, 0.0)
        row.presence = maybe(0.8, 0.0)
        row.min_tokens = int(maybe(7, 0)) if row.stop else 0
        row.bias = {token: float(rng.normal(0, 5)) for token in tokens(0, 12)}
        if rng.random() < 0.4:
            row.allowed = sorted({*tokens(40, 90)} - {*row.stop}) or [5]
        if rng.random() < 0.6:
            row.bad_words = [tokens(1, 2), row.outputs[-2:] + tokens(1, 2), [*row.prompt, *tokens(1, 3)]]
            row.bad_words += [[token] for token in tokens(0, 6)]
    return row


def to_sampling(row: Row, max_tokens: int) -> Sampling:
    has_bias = bool(row.bias)
    return Sampling(
        max_tokens=max_tokens,
        temperature=row.temperature,
        top_k=row.top_k,
        top_p=row.top_p,
        min_p=row.min_p,
        repetition_penalty=row.repetition,
        frequency_penalty=row.frequency,
        presence_penalty=row.presence,
        min_tokens=row.min_tokens,
        eos_token_ids=[token for token in row.stop if token == EOS],
        stop_token_ids=[token for token in row.stop if token != EOS],
        bad_words=[list(word) for word in row.bad_words],
        logit_bias_ids=np.array(list(row.bias), np.int32) if has_bias else None,
        logit_bias_values=np.array(list(row.bias.values()), np.float32) if has_bias else None,
        allowed_token_ids=None if row.allowed is None else np.array(row.allowed, np.int32),
    )


@dataclasses.dataclass
class Outcome:
    """What a step leaves behind, on the CPU."""

    out_3S: Tensor
    tokens_RM: Tensor
    lengths_R: Tensor
    finished_R: Tensor
    seen: Tensor | None


class Rig:
    """Requests in some rows of a batch, on the CPU; `step` and `expected` leave it as it is."""

    def __init__(
        self, rows: Sequence[Row], vocab_size: int, *, max_tokens: int = 1000, seed: int = 0
    ) -> None:
        self.vocab_size = vocab_size
        self.requests = list(rows)
        self.places = np.random.default_rng(seed).permutation(NUM_ROWS)[: len(rows)].astype(np.int32)
        self.state = SamplingState(NUM_ROWS, vocab_size, MAX_LEN, CPU)
        self.batch = DeviceBatch(NUM_ROWS, MAX_LEN, 16, CPU)
        for place, row in zip(self.places.tolist(), rows, strict=True):
            tokens = np.array(row.prompt + row.outputs, np.int32)
            self.state.admit(place, to_sampling(row, max_tokens), row.seed, len(row.prompt), tokens)
            self.batch.history_RM[place, : len(tokens)] = torch.from_numpy(tokens)
            self.batch.lengths_R[place] = len(tokens)

    def freeze(self, *indices: int) -> None:
        self.batch.finished_R[torch.from_numpy(self.places[list(indices)]).long()] = True

    def expected(self, logits_SV: Tensor, soft_cap: float | None = None) -> Outcome:
        """By the sampler and the batch, without padding lines."""
        logits = logits_SV.cpu().float().contiguous().clone()
        if soft_cap is not None:
            logits = torch.tanh(logits / soft_cap) * soft_cap
        batch, places = self.batch, torch.from_numpy(self.places).long()
        saved = [tensor.clone() for tensor in (batch.history_RM, batch.lengths_R, batch.finished_R)]
        seen = None if self.state.seen is None else self.state.seen.clone()
        frozen = batch.finished_R[places]
        result = Sampler(self.state)(
            logits, self.state.plan(self.places), batch.history_RM, batch.lengths_R, frozen
        )
        void = frozen | result.bad_B
        token = result.token_B.masked_fill(void, 0)
        batch.append(places, token, result.finish_B, frozen)
        out = torch.stack((token, result.finish_B.int(), result.bad_B.int()))
        state_seen = self.state.seen
        outcome = Outcome(
            out,
            batch.history_RM.clone(),
            batch.lengths_R.clone(),
            batch.finished_R.clone(),
            None if state_seen is None else state_seen.clone(),
        )
        for tensor, old in zip((batch.history_RM, batch.lengths_R, batch.finished_R), saved, strict=True):
            tensor.copy_(old)
        if state_seen is not None and seen is not None:
            state_seen.copy_(seen)
        return outcome

    def step(
        self,
        sample_rows: SampleRows,
        logits_SV: Tensor,
        *,
        variant: Variant | None = None,
        lines: Sequence[int] | None = None,
        soft_cap: float | None = None,
    ) -> Outcome:
        """By `sample_rows` on the logits' device. `lines`: a request's index for each line, -1 for padding."""
        device = logits_SV.device
        lines = range(len(self.places)) if lines is None else lines
        row_S = torch.tensor(
            [self.places[i] if i >= 0 else -1 for i in lines], dtype=torch.int32, device=device
        )
        tables = _on(self.state.tables(), device)
        batch = self.batch
        history = RowHistory(
            batch.history_RM.clone().to(device),
            batch.lengths_R.clone().to(device),
            batch.finished_R.clone().to(device),
        )
        out = torch.full((4, len(row_S) + 3), GARBAGE, dtype=torch.int32, device=device)
        before = logits_SV.clone()
        sample_rows(
            logits_SV,
            row_S,
            tables,
            history,
            out,
            variant=self.state.variant(self.places) if variant is None else variant,
            max_model_len=MAX_LEN,
            logit_soft_cap=soft_cap,
        )
        as_bytes = logits_SV.view(torch.uint8), before.view(torch.uint8)
        assert torch.equal(*as_bytes)  # NaN included
        assert (out[3] == GARBAGE).all() and (out[:, len(row_S) :] == GARBAGE).all()
        return Outcome(
            out[:3, : len(row_S)].cpu(),
            history.tokens_RM.cpu(),
            history.lengths_R.cpu(),
            history.finished_R.cpu(),
            None if tables.seen is None else tables.seen.cpu(),
        )

    def assert_like(self, got: Outcome, logits_SV: Tensor, *, soft_cap: float | None = None) -> None:
        """The outcome is that of sampler and batch; a draw may differ where rounding decides it."""
        want = self.expected(logits_SV, soft_cap)
        differing = (got.out_3S[0] != want.out_3S[0]).nonzero().flatten().tolist()
        logits = logits_SV.cpu().double().numpy()
        if soft_cap is not None:
            logits = np.tanh(logits / soft_cap) * soft_cap
        for i in differing:
            assert int(got.out_3S[0, i]) in close_calls(logits[i], self.requests[i]), i
        assert len(differing) <= 1, "rounding decides once in 100,000 draws"
        same_R = torch.ones(NUM_ROWS, dtype=torch.bool)
        same_R[torch.from_numpy(self.places[differing]).long()] = False
        same_S = torch.tensor([i not in differing for i in range(len(self.places))])
        assert torch.equal(got.out_3S[:, same_S], want.out_3S[:, same_S])
        # Frozen rows of the reference write a void token to the column past the last.
        assert torch.equal(got.tokens_RM[same_R, :MAX_LEN], want.tokens_RM[same_R, :MAX_LEN])
        assert torch.equal(got.lengths_R, want.lengths_R)
        assert torch.equal(got.finished_R[same_R], want.finished_R[same_R])
        if want.seen is not None and got.seen is not None:
            assert torch.equal(got.seen[same_R], want.seen[same_R])


def close_calls(logits: npt.NDArray[np.float64], row: Row) -> set[int]:
    """Tokens that a row may draw if sums and noise are rounded differently."""
    values = reference.processed(logits, row)
    if row.temperature == 0:
        return {int(values.argmax())}
    key = reference.keys(row.seed, len(row.outputs))
    found = set()
    for shift in (-1e-5, 0.0, 1e-5):
        varied = dataclasses.replace(row, top_p=row.top_p * (1 + shift) if row.top_p < 1 else 1.0)
        for min_p in (row.min_p * (1 - 1e-5), row.min_p * (1 + 1e-5)):
            kept = reference.kept(values, dataclasses.replace(varied, min_p=min_p))
            score = {t: values[t] / row.temperature - reference.log_noise(t, key) for t in kept}
            best = max(score.values())
            found |= {token for token in kept if score[token] > best - 1e-4}
    return found


def _on(tables: SamplingTables, device: torch.device) -> SamplingTables:
    """A copy on a device."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.clone().to(device)

    return SamplingTables(
        reals=moved(tables.reals),
        wholes=moved(tables.wholes),
        stop_ids=moved(tables.stop_ids),
        stop_finish=moved(tables.stop_finish),
        allowed_bits=moved(tables.allowed_bits),
        bias_ids=moved(tables.bias_ids),
        bias_values=moved(tables.bias_values),
        bad_words=moved(tables.bad_words),
        seen=None if tables.seen is None else moved(tables.seen),
    )


def normal_logits(rng: np.random.Generator, lines: int, vocab_size: int, scale: float = 2.0) -> Tensor:
    values: Floats = rng.normal(0, scale, (lines, vocab_size)).astype(np.float32)
    return torch.from_numpy(values)
