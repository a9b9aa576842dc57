"""A whole turn of the worker's loop costs the same whatever the batch: message, forward pass, sampling, result."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tercet.config import ProcessConfig
from tercet.ipc.channel import RouterEnd
from tercet.ipc.messages import PROTOCOL_VERSION, StepResult, WorkerHello, WorkerToCore, WorkerWelcome
from tercet.worker_proc.worker import Worker
from tests.worker_proc.runner_harness import RunnerEngine
from tests.worker_proc.test_model_runner import make_request

NUM_STEPS = 8
TIMEOUT_MS = 20_000


class WorkerTurns(RunnerEngine):
    """As RunnerEngine, but plans and results cross sockets and the worker's own loop runs the steps."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        super().__init__(folder, num_blocks=1024, audit=False)
        address = f"ipc://{sockets}/worker"
        process = ProcessConfig(
            engine=self.config, worker_address=address, frontend_address="", runtime_dir="", epoch=1
        )
        self.router = RouterEnd[WorkerToCore](address, WorkerToCore)
        self.worker = Worker(process, self.runner, os.getpid())
        self.worker._plans.send(self.worker.hello())
        self.peer, hello = self._receive()
        assert isinstance(hello, WorkerHello)
        self.router.send(self.peer, WorkerWelcome(epoch=1, protocol_version=PROTOCOL_VERSION))
        self._turn()

    def close(self) -> None:
        self.worker.close()
        self.router.close()

    def step(self) -> tuple[int, bool]:
        """One step; returns the calls of the worker's turn, and whether the plan carried any change."""
        plan = self.scheduler.schedule(0.0)
        assert plan is not None
        self.router.send(self.peer, plan)
        calls = self._turn()
        _, result = self._receive()
        assert isinstance(result, StepResult)
        self.in_flight.append(result)
        self.land()
        return calls, plan.blocks is not None or plan.states is not None or plan.chunks is not None

    def _receive(self) -> tuple[bytes, WorkerToCore]:
        assert self.router._socket.poll(TIMEOUT_MS), "nothing came"
        received = self.router.recv_nowait()
        assert received is not None
        return received

    def _turn(self) -> int:
        assert self.worker._plans._socket.poll(TIMEOUT_MS), "nothing came"
        calls = 0

        def profile(_frame: object, event: str, _arg: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            self.worker.turn()
        finally:
            sys.setprofile(None)
        return calls


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short name, since those of sockets must be short."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    assert list(path.iterdir()) == []
    shutil.rmtree(path)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "frequency_penalty": 1.0}])
def test_whole_turns_of_the_worker_cost_the_same_at_8_and_256_running(
    tmp_path: Path, sockets: Path, sampling: dict[str, Any]
) -> None:
    found = {}
    for batch in (8, 256):
        engine = WorkerTurns(tmp_path, sockets)
        try:
            for handle in range(batch):
                engine.add(make_request(handle, [1 + handle, 2, 3], max_tokens=40, **sampling))
            for _ in range(3):
                engine.step()
            steps = [engine.step() for _ in range(NUM_STEPS)]
        finally:
            engine.close()
        found[batch] = {calls for calls, changed in steps if not changed}
    assert found[8] == found[256]
    assert len(found[8]) == 1
