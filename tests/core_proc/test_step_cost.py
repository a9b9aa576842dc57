"""A step costs what changes: the number of Python calls in steady decode does not depend on the batch.

Counted twice: in the scheduler and the codec alone, where a difference is quickly found, and in whole turns of the
core's and of the worker's loop over real sockets, where nothing can hide.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from tercet.core_proc.results import apply_result
from tercet.ipc.codec import Buffer, Decoder, Encoder
from tercet.ipc.messages import StepResult, WorkerToCore
from tests.core_proc.harness import Engine, make_config, make_request
from tests.core_proc.local_engine import LocalEngine
from tests.core_proc.raw_frontend import RawFrontend

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


# ------------------------------------------------------------------------------------------ whole turns


class Turns:
    """A local engine in steady decode with two steps in flight, and a frontend for it."""

    def __init__(self, engine: LocalEngine, num_running: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = engine
        self.frontend = RawFrontend(engine.address)
        monkeypatch.setattr("tercet.core_proc.core._HEARTBEAT_S", 0.05)  # a turn may wait for nothing
        self.frontend.hello()
        engine.core_turn()
        self.frontend.read_until(lambda: self.frontend.welcome is not None)
        for handle in range(num_running):
            message = make_request([handle % 90 + 1, handle // 90 + 1, 5], handle=handle, max_tokens=1000)
            self.frontend.add(message)
        scheduler = engine.core.scheduler
        while scheduler.rows.num_running < num_running:
            engine.core_turn()
            while scheduler.num_in_flight > len(engine.core._results):
                engine.worker_turn()
                self.await_result()
                engine.core._handle_messages(wait=False)
        engine.core_turn()
        monkeypatch.setattr("tercet.core_proc.core._HEARTBEAT_S", 3600.0)  # a heartbeat is not of a step
        for _ in range(5):
            self.turn()

    def await_result(self) -> None:
        self.engine.wait_readable(self.engine.workers)

    def turn(self, in_core: Any = None, in_worker: Any = None) -> None:
        """A step on the worker, then a turn of the core, each under a profile function of its own."""
        engine = self.engine
        engine.wait_readable(engine.worker._plans)
        _profiled(engine.worker.turn, in_worker)
        self.await_result()
        _profiled(engine.core_turn, in_core)

    def count(self) -> tuple[list[int], list[int]]:
        """Calls in each of some turns of the core, and of the worker."""
        core, worker = [], []
        for _ in range(NUM_STEPS):
            calls: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
            self.turn(calls[0], calls[1])
            core.append(calls[0].total())
            worker.append(calls[1].total())
        return core, worker


def _profiled(function: Callable[[], object], calls: Counter[str] | None) -> None:
    """Call a function and count the calls that it makes, Python's and built-in ones, by their names."""
    if calls is None:
        function()
        return

    def count(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            calls[arg.__qualname__] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)


def count_turns(num_running: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    sizes = {
        "num_blocks": 2 * num_running + 8,
        "block_size": 512,
        "max_num_seqs": num_running,
        "max_num_batched_tokens": num_running + 1024,
        "max_model_len": 1024,
        "verify": False,
    }
    with LocalEngine(**sizes) as engine:
        turns = Turns(engine, num_running, monkeypatch)
        with turns.frontend:
            return turns.count()


def test_whole_turns_of_core_and_worker_cost_the_same_at_8_and_256_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = (count_turns(n, monkeypatch) for n in (8, 256))
    for name, a, b in zip(("core", "worker"), few, many, strict=True):
        assert len(set(a)) == 1 and a[0] > 50, f"a steady turn of the {name} costs the same each time"
        assert a == b, name


def test_what_a_row_would_cost_in_a_turn_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for each row, planted in the core's part of a turn that only whole turns cover."""
    from tercet.core_proc.core import Core

    send = Core._send_outputs

    def send_by_row(core: Core, outputs: Any) -> None:
        for _, message in outputs:
            for token in message.token.tolist():
                abs(token)
        send(core, outputs)

    monkeypatch.setattr(Core, "_send_outputs", send_by_row)
    few, many = (count_turns(n, monkeypatch)[0] for n in (8, 16))
    assert many[0] - few[0] == 8
