"""A step costs what changes: the number of Python calls in steady decode does not depend on the batch."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest

from tercet.core_proc.results import apply_result
from tercet.ipc.codec import Buffer, Decoder, Encoder
from tercet.ipc.messages import StepResult, WorkerToCore
from tests.core_proc.harness import Engine, make_config, make_request

NUM_STEPS = 20


def decoding_engine(num_running: int, *, block_size: int = 512, num_frontends: int = 1) -> Engine:
    """An engine in steady decode, every row in its first block and far from its end."""
    engine = Engine(
        make_config(
            num_blocks=2 * num_running + 8,
            block_size=block_size,
            max_num_seqs=num_running,
            max_num_batched_tokens=num_running + 64,
            max_model_len=1024,
            verify=False,
        )
    )
    for handle in range(num_running):
        message = make_request([handle % 90 + 1, handle // 90 + 1, 5], handle=handle, max_tokens=1000)
        engine.add(message, frontend=1 + handle % num_frontends)
    while engine.step() is not None and engine.plans[-1].chunks is not None:
        pass
    return engine


class CoreStep:
    """What the core does in a step, from a result's bytes to the next plan's and the outputs'."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.worker = Encoder()
        self.encoder = Encoder()
        self.decoder: Decoder[StepResult] = Decoder(WorkerToCore)

    def worker_side(self) -> list[Buffer]:
        """Run the plan in flight on the worker; returns the frames of its result."""
        plan = self.engine.scheduler.schedule(0.0)
        assert plan is not None
        self.engine.runner.execute(plan, 0.0, self.engine.in_flight.append)
        return self.worker.encode_bytes(self.engine.in_flight.popleft())

    def core_side(self, frames: list[Buffer]) -> None:
        scheduler = self.engine.scheduler
        outgoing = apply_result(scheduler, self.decoder.decode(frames), 0.0)
        for _, message in outgoing.outputs:
            self.encoder.encode(message)
        plan = scheduler.schedule(0.0)
        assert plan is not None
        self.encoder.encode(plan)
        self.engine.runner.execute(plan, 0.0, self.engine.in_flight.append)


def count_calls(engine: Engine) -> list[int]:
    """Calls of Python functions and of built-in ones in each of some steps of the core."""
    step = CoreStep(engine)
    frames = step.worker_side()
    counts = []
    for _ in range(NUM_STEPS):
        calls: Counter[str] = Counter()

        def count(frame: FrameType, event: str, arg: Any, calls: Counter[str] = calls) -> None:
            calls[event] += 1

        scheduler = engine.scheduler
        result = step.decoder.decode(frames)
        sys.setprofile(count)
        try:
            outgoing = apply_result(scheduler, result, 0.0)
            for _, message in outgoing.outputs:
                step.encoder.encode(message)
            plan = scheduler.schedule(0.0)
            assert plan is not None
            step.encoder.encode(plan)
        finally:
            sys.setprofile(None)
        engine.runner.execute(plan, 0.0, engine.in_flight.append)
        frames = step.worker.encode_bytes(engine.in_flight.popleft())
        counts.append(calls["call"] + calls["c_call"])
    return counts


def test_calls_in_steady_decode_are_equal_at_8_and_256_running() -> None:
    few, many = (count_calls(decoding_engine(n)) for n in (8, 256))
    assert len(set(few)) == 1, "a steady step costs the same each time"
    assert few == many


def test_a_block_append_costs_a_bounded_number_of_calls() -> None:
    """Each row crosses a block boundary twice in 16 steps: what that costs is per step that has appends."""
    counts = count_calls(decoding_engine(32, block_size=8))[:16]
    extra = sum(counts) - 16 * min(counts)
    assert 0 < extra / (2 * 32) < 15


@pytest.mark.parametrize("num_frontends", [2, 4])
def test_each_further_frontend_costs_a_bounded_number_of_calls(num_frontends: int) -> None:
    few, many = (count_calls(decoding_engine(n, num_frontends=num_frontends)) for n in (8, 256))
    assert few == many
