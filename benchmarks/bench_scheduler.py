"""What does the core's part of a step cost in steady decode, and how does it grow with the batch?

A round applies a result with a token for each of n rows and plans the next step, two steps being in flight as in the
overlapped loop. Rows stand at different places of their blocks, so that one in sixteen crosses into a new one at each
step. Nothing arrives and nothing ends: that is what the budget is for.

    python -m pytest benchmarks/bench_scheduler.py --benchmark-columns=median,iqr,ops
"""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tercet.config import SchedulerConfig
from tercet.core_proc.results import Outgoing, apply_result
from tercet.core_proc.scheduler import Scheduler
from tercet.ipc.messages import AddRequest, Sampling, StepPlan, StepResult

NUM_RUNNING = (8, 64, 256, 1024)
BLOCK_SIZE = 16
ROUNDS = 1500
MAX_MODEL_LEN = ROUNDS + 1000


class SteadyDecode:
    """A scheduler with n rows that decode, and a worker that answers every plan at once."""

    def __init__(self, n: int, num_frontends: int = 1) -> None:
        config = SchedulerConfig(max_num_seqs=n, max_num_batched_tokens=n + 4096, max_model_len=MAX_MODEL_LEN)
        num_blocks = n * (MAX_MODEL_LEN // BLOCK_SIZE + 1) + 1
        self.scheduler = Scheduler(config, num_blocks=num_blocks, block_size=BLOCK_SIZE)
        self.results: deque[StepResult] = deque()
        for handle in range(n):
            self.scheduler.add(1 + handle % num_frontends, make_request(handle), 0.0)
        while len(self.scheduler.waiting) or self.prefilling():
            self.send(self.scheduler.schedule(0.0))
            apply_result(self.scheduler, self.results.popleft(), 0.0)
        for _ in range(2):
            self.send(self.scheduler.schedule(0.0))

    def prefilling(self) -> bool:
        rows = self.scheduler.rows
        return bool((rows.computed[rows.occupied()] < rows.known[rows.occupied()] - 1).any())

    def send(self, plan: StepPlan | None) -> None:
        """The worker's answer: the next token of each row that ran."""
        assert plan is not None
        rows = self.scheduler.rows
        row = np.flatnonzero(rows.planned > rows.known + len(self.results)).astype(np.int32)
        self.results.append(
            StepResult(
                epoch=plan.epoch,
                step=plan.step,
                row=row,
                gen=rows.gen[row],
                token=row % 1000,
                finish=np.zeros(len(row), np.uint8),
            )
        )

    def step(self, result: StepResult) -> tuple[Outgoing, StepPlan | None]:
        outgoing = apply_result(self.scheduler, result, 0.0)
        return outgoing, self.scheduler.schedule(0.0)


def make_request(handle: int) -> AddRequest:
    tokens = np.random.default_rng(handle).integers(0, 1000, 33 + handle % BLOCK_SIZE).astype(np.int32)
    sampling = Sampling(max_tokens=MAX_MODEL_LEN)
    return AddRequest(
        epoch=1, handle=handle, token_ids=tokens, prompt_len=len(tokens), sampling=sampling, seeds=[handle]
    )


@pytest.mark.parametrize("num_frontends", [1, 4])
@pytest.mark.parametrize("n", NUM_RUNNING)
def test_apply_and_schedule(benchmark: BenchmarkFixture, n: int, num_frontends: int) -> None:
    core = SteadyDecode(n, num_frontends)
    planned: list[StepPlan | None] = []

    def setup() -> tuple[tuple[StepResult], dict[str, object]]:
        if planned:
            core.send(planned.pop())
        return (core.results.popleft(),), {}

    def step(result: StepResult) -> None:
        planned.append(core.step(result)[1])

    piece = "core: apply result and plan" + (f", {num_frontends} frontends" if num_frontends > 1 else "")
    benchmark.extra_info.update(piece=piece, n=n)
    benchmark.pedantic(step, setup=setup, rounds=ROUNDS, warmup_rounds=50)  # type: ignore[no-untyped-call]
    assert core.scheduler.rows.num_running == n and core.scheduler.counters.num_preemptions == 0


@pytest.mark.parametrize("num_tokens", [512, 8192])
def test_a_prompt_waits_that_does_not_fit(benchmark: BenchmarkFixture, num_tokens: int) -> None:
    """The head of the queue is looked at in every step; a long one that must wait shall not make steps dear."""
    config = SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=16384, max_model_len=16384)
    num_blocks = 16384 // BLOCK_SIZE + 1
    scheduler = Scheduler(config, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    tokens = np.arange(num_tokens, dtype=np.int32) % 1000
    sampling = Sampling(max_tokens=8000)
    for handle in range(2 + 16384 // num_tokens):
        salted = AddRequest(
            epoch=1,
            handle=handle,
            token_ids=tokens,
            prompt_len=num_tokens,
            sampling=sampling,
            seeds=[handle],
            cache_salt=str(handle % 2) if num_tokens == 8192 else str(handle),
        )
        scheduler.add(1, salted, 0.0)
    scheduler.schedule(0.0)
    assert len(scheduler.waiting)
    benchmark.extra_info.update(
        piece="core: look at a prompt that must wait",
        n=f"{num_tokens} tokens",
    )
    benchmark(scheduler._admit, 100, 0.0)
    assert len(scheduler.waiting)
