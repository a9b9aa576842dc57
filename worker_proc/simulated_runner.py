"""A worker without a model: the same plans and results, a latency model, and tokens that depend on the cache.

The cache of this runner holds, for each position, a hash of all tokens up to it, computed from the entry of
the position before, which is read through the block table. The next token is a function of the newest entry.
So a token comes out right only if every block that it depends on was assigned, filled and kept as it should
be, and a scheduler that hands out a block too early changes the text: tests compare with `expected_tokens`.

No torch. Used by the tests, for capacity planning (how many requests fit a given latency and cache), and by
the benchmarks of everything that is not the model.
"""

from __future__ import annotations

import time

import numpy as np

from tercet.config import ProcessConfig
from tercet.ipc.messages import (
    Admission,
    Finish,
    KVGroup,
    RowErrors,
    RowState,
    Sampling,
    StepPlan,
    StepResult,
)
from tercet.worker_proc.audit import check_audit
from tercet.worker_proc.worker import Deliver

_FREE = 255
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_ROOT = np.uint64(0x243F6A8885A308D3)
_BYTES_PER_TOKEN = 8


class SimulatedRunner:
    """Executes plans on a cache of hashes. Steady decode is vector operations over the decoding rows."""

    device = "simulated"

    def __init__(self, config: ProcessConfig) -> None:
        engine = config.engine
        scheduler, self.block_size = engine.scheduler, engine.cache.block_size
        simulation = engine.worker.simulation
        self.num_blocks = engine.cache.num_blocks_override or simulation.num_blocks
        self.groups = [KVGroup(num_layers=1, block_bytes=_BYTES_PER_TOKEN * self.block_size)]
        self.vocab_size = engine.model.vocab_size
        self.max_model_len = engine.model.max_model_len
        self.simulation = simulation
        rows = scheduler.max_num_seqs
        self.gen = np.zeros(rows, np.int32)
        self.state = np.full(rows, _FREE, np.uint8)
        self.length = np.zeros(rows, np.int64)  # tokens known
        self.limit = np.zeros(rows, np.int64)
        self.min_length = np.zeros(rows, np.int64)  # no eos or stop token before this length
        self.frozen = np.zeros(rows, np.bool_)
        self.noise = np.zeros(rows, np.uint64)
        self.stops = np.full((rows, 1), -1, np.int64)  # eos ids as they are, stop ids + vocab_size
        self.tokens = np.zeros((rows, self.max_model_len + 1), np.int64)
        self.block_table = np.zeros((rows, -(-self.max_model_len // self.block_size) + 1), np.int64)
        self.cache = np.zeros(self.num_blocks * self.block_size, np.uint64)
        self._refused: dict[int, str] = {}

    # ------------------------------------------------------------------------------------ Runner

    def execute(self, plan: StepPlan, received_s: float, deliver: Deliver) -> None:
        self._apply(plan)
        if plan.audit is not None:
            check_audit(plan.audit, self.gen, self.state, self.block_table)
        decoding = np.flatnonzero((self.state == RowState.DECODE) & ~self.frozen)
        sampled = [self._decode(decoding)] if len(decoding) else []
        num_tokens = len(decoding)
        for row, start, length, sample in plan.chunks.tolist() if plan.chunks is not None else ():
            self._prefill(row, start, length)
            num_tokens += length
            if sample:
                sampled.append(np.array([row]))
        rows = np.concatenate(sampled) if sampled else np.zeros(0, np.int64)
        if self.simulation.verify:
            self._verify(rows)
        token, finish = self._sample(rows)
        launched_s = time.perf_counter()
        self._wait(received_s, num_tokens)
        deliver(self._result(plan, rows, token, finish, received_s, launched_s))

    def clear(self) -> None:
        self.state[:] = _FREE

    def close(self) -> None:
        pass

    # ------------------------------------------------------------------------------------ changes

    def _apply(self, plan: StepPlan) -> None:
        if plan.releases is not None:
            self.state[plan.releases] = _FREE
        for admission in plan.admissions:
            self._admit(admission)
        if plan.states is not None:
            self.state[plan.states[:, 0]] = plan.states[:, 1]
        if plan.blocks is not None:
            _, row, index, block = plan.blocks.T
            self.block_table[row, index] = block

    def _admit(self, admission: Admission) -> None:
        row, sampling = admission.row, admission.sampling
        if self.state[row] != _FREE:
            raise AssertionError(f"row {row} was given away twice")
        length = len(admission.token_ids)
        self.gen[row] = admission.gen
        self.state[row] = RowState.PREFILL
        self.frozen[row] = False
        self.length[row] = length
        self.limit[row] = min(admission.prompt_len + sampling.max_tokens, self.max_model_len)
        self.min_length[row] = admission.prompt_len + sampling.min_tokens
        self.noise[row] = admission.seed if sampling.temperature > 0 else 0
        self.tokens[row, :length] = admission.token_ids
        blocks = admission.blocks[0]
        self.block_table[row, : len(blocks)] = blocks
        self._set_stops(row, sampling)
        self._refused.pop(row, None)  # of an owner that was aborted before its first token
        if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
            self._refused[row] = "the simulated model has no log-probabilities"

    def _set_stops(self, row: int, sampling: Sampling) -> None:
        codes = [*sampling.eos_token_ids, *(i + self.vocab_size for i in sampling.stop_token_ids)]
        if len(codes) > self.stops.shape[1]:
            wider = np.full((len(self.stops), len(codes)), -1, np.int64)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[row] = -1
        self.stops[row, : len(codes)] = codes

    # ------------------------------------------------------------------------------------ the "model"

    def _slots(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        size = self.block_size
        slots: np.ndarray = self.block_table[row, position // size] * size + position % size
        return slots

    def _decode(self, row: np.ndarray) -> np.ndarray:
        position = self.length[row] - 1
        before = self.cache[self._slots(row, position - 1)]
        token = self.tokens[row, position].astype(np.uint64)
        self.cache[self._slots(row, position)] = before * _BASE + token
        return row

    def _prefill(self, row: int, start: int, length: int) -> None:
        positions = np.arange(start, start + length)
        rows = np.full(length, row)
        before = self.cache[self._slots(rows[:1], positions[:1] - 1)][0] if start else _ROOT
        token = self.tokens[row, start : start + length].astype(np.uint64)
        self.cache[self._slots(rows, positions)] = chain(before, token)

    def _sample(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Next tokens of rows, appended to them, and why a row ends (it is frozen then)."""
        if not len(row):
            return np.zeros(0, np.int32), np.zeros(0, np.uint8)
        position = self.length[row] - 1
        token = next_token(self.cache[self._slots(row, position)], self.noise[row], self.vocab_size)
        length = self.length[row] + 1
        stops = self.stops[row]
        may_stop = length > self.min_length[row]
        eos = (stops == token[:, None]).any(1) & may_stop
        stop = (stops == token[:, None] + self.vocab_size).any(1) & may_stop
        finish = np.where(length >= self.limit[row], np.uint8(Finish.LENGTH), np.uint8(Finish.NONE))
        finish = np.where(stop, np.uint8(Finish.STOP_TOKEN), finish)
        finish = np.where(eos, np.uint8(Finish.EOS), finish)
        self.tokens[row, length - 1] = token
        self.length[row] = length
        self.frozen[row] = finish != 0
        return token.astype(np.int32), finish

    def _verify(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            length = int(self.length[row])
            expected = chain(_ROOT, self.tokens[row, :length].astype(np.uint64))
            slots = self._slots(np.full(length, row), np.arange(length))
            if not np.array_equal(self.cache[slots], expected):
                raise AssertionError(f"the cache of row {row} does not hold its tokens")

    def _wait(self, received_s: float, num_tokens: int) -> None:
        """Take as long as the latency model says; without one, as long as it took."""
        duration_us = self.simulation.step_us + self.simulation.token_us * num_tokens
        remaining = received_s + duration_us * 1e-6 - time.perf_counter()
        if remaining > 0:
            time.sleep(remaining)

    def _result(
        self,
        plan: StepPlan,
        row: np.ndarray,
        token: np.ndarray,
        finish: np.ndarray,
        received_s: float,
        launched_s: float,
    ) -> StepResult:
        errors = None
        if self._refused:
            bad = [int(r) for r in row if int(r) in self._refused]
            if bad:
                errors = RowErrors(
                    row=np.array(bad, np.int32),
                    gen=self.gen[bad],
                    message=[self._refused.pop(r) for r in bad],
                )
                keep = ~np.isin(row, bad)
                row, token, finish = row[keep], token[keep], finish[keep]
        return StepResult(
            epoch=plan.epoch,
            step=plan.step,
            row=row.astype(np.int32),
            gen=self.gen[row],
            token=token,
            finish=finish,
            row_errors=errors,
            host_us=(launched_s - received_s) * 1e6,
            step_us=(time.perf_counter() - received_s) * 1e6,
        )


def chain(before: np.uint64, token: np.ndarray) -> np.ndarray:
    """h[i] = h[i - 1] × B + token[i] modulo 2^64 with h[-1] = before, for all i at once (token: u64[n])."""
    n = len(token)
    powers = np.cumprod(np.full(n, _BASE, np.uint64))  # B^1 … B^n
    inverses = np.cumprod(np.full(n, _INVERSE, np.uint64))  # B^-1 … B^-n
    hashes: np.ndarray = powers * (before + np.cumsum(token * inverses, dtype=np.uint64))
    return hashes


def next_token(entry: np.ndarray, noise: np.ndarray, vocab_size: int) -> np.ndarray:
    """Token that follows a prefix with this cache entry (splitmix64 finaliser, Steele et al. 2014)."""
    x = entry ^ noise
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    token: np.ndarray = ((x ^ (x >> np.uint64(31))) % np.uint64(vocab_size)).astype(np.int64)
    return token


def expected_tokens(prompt: list[int], count: int, vocab_size: int, seed: int = 0) -> list[int]:
    """What the simulated model says to a prompt: `count` tokens, ends ignored."""
    with np.errstate(over="ignore"):
        tokens: list[int] = []
        entry = chain(_ROOT, np.array(prompt, np.uint64))[-1]
        for _ in range(count):
            token = int(next_token(np.array([entry]), np.array([seed], np.uint64), vocab_size)[0])
            tokens.append(token)
            entry = entry * _BASE + np.uint64(token)
    return tokens
