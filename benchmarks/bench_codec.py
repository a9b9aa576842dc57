"""What does it cost to put a step on the wire and take it off again, and how does that grow with the batch?

A round is a step in steady decode with n rows: the plan (a block append for one row in sixteen) and the result (a
token for each row), each encoded and decoded; or the outputs for one frontend. Then single arrays, inline and in a
frame of their own, from which `codec.INLINE_BYTES` was chosen.

    python -m pytest benchmarks/bench_codec.py --benchmark-columns=median,iqr,ops
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tercet.ipc.codec import Decoder, Encoder
from tercet.ipc.messages import (
    Abort,
    CoreToFrontend,
    CoreToWorker,
    FrontendToCore,
    StepOutputs,
    StepPlan,
    StepResult,
    WorkerToCore,
)

NUM_RUNNING = (8, 64, 256, 1024)
BLOCK_SIZE = 16


def make_plan(n: int) -> StepPlan:
    rows = np.arange(0, n, BLOCK_SIZE, dtype=np.int32)
    blocks = np.stack([0 * rows, rows, rows + 3, rows + 1000], axis=1).astype(np.int32)
    return StepPlan(epoch=2**52, step=100_000, max_len=2048, blocks=blocks)


def make_result(n: int) -> StepResult:
    rows = np.arange(n, dtype=np.int32)
    return StepResult(
        epoch=2**52,
        step=100_000,
        row=rows,
        gen=rows,
        token=rows,
        finish=np.zeros(n, np.uint8),
        step_us=1000.0,
    )


def make_outputs(n: int) -> StepOutputs:
    rows = np.arange(n, dtype=np.int32)
    return StepOutputs(
        epoch=2**52,
        step=100_000,
        handle=np.arange(n, dtype=np.uint64),
        first_index=rows,
        token=rows,
        finish=np.zeros(n, np.uint8),
    )


class RoundTrip:
    """An encoder and the decoder of the far side."""

    def __init__(self, inbox: Any, inline_bytes: int | None = None) -> None:
        self.encoder = Encoder() if inline_bytes is None else Encoder(inline_bytes)
        self.decoder: Decoder[Any] = Decoder(inbox)

    def __call__(self, message: Any) -> Any:
        # The bytes are copied once, as the socket does.
        return self.decoder.decode(self.encoder.encode_bytes(message))


@pytest.mark.parametrize("n", NUM_RUNNING)
def test_plan_and_result_of_a_step(benchmark: BenchmarkFixture, n: int) -> None:
    plan, result = make_plan(n), make_result(n)
    to_worker, to_core = RoundTrip(CoreToWorker), RoundTrip(WorkerToCore)

    def step() -> None:
        to_worker(plan)
        to_core(result)

    benchmark.extra_info.update(piece="codec: plan and result", n=n)
    benchmark(step)


@pytest.mark.parametrize("n", NUM_RUNNING)
def test_outputs_of_a_step(benchmark: BenchmarkFixture, n: int) -> None:
    outputs, to_frontend = make_outputs(n), RoundTrip(CoreToFrontend)
    benchmark.extra_info.update(piece="codec: outputs to one frontend", n=n)
    benchmark(to_frontend, outputs)


@pytest.mark.parametrize("kilobytes", [1, 4, 16, 64, 256, 1024])
@pytest.mark.parametrize("where", ["inline", "frame"])
def test_one_array(benchmark: BenchmarkFixture, kilobytes: int, where: str) -> None:
    """Encoding and decoding alone; what the socket adds is in bench_channel.py."""
    message = Abort(epoch=1, handles=np.zeros(kilobytes * 128, np.uint64))
    trip = RoundTrip(FrontendToCore, inline_bytes=1 << 30 if where == "inline" else 0)
    benchmark.extra_info.update(piece=f"codec: an array, {where}", n=f"{kilobytes} KB")
    benchmark(trip, message)
