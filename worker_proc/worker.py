"""The worker's loop: plans in, results out. What a step computes is the runner's business."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from tercet.config import ProcessConfig
from tercet.gc_pauses import GcPauses
from tercet.ipc.channel import DealerEnd
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    Call,
    CoreToWorker,
    Heartbeat,
    KVGroup,
    Reply,
    Shutdown,
    StartProfile,
    StepPlan,
    StepResult,
    StopProfile,
    WorkerFailed,
    WorkerHello,
    WorkerWelcome,
)
from tercet.log import get_logger
from tercet.worker_proc.tracing import RowTracing

logger = get_logger(__name__)

Deliver = Callable[[StepResult], None]
Execute = Callable[[StepPlan, float, Deliver], None]


class ProfileError(Exception):
    """A profile cannot be started or stopped; the message says why."""


class Runner(Protocol):
    """Executes plans in order."""

    num_blocks: int
    groups: list[KVGroup]
    device: str

    def execute(self, plan: StepPlan, received_s: float, deliver: Deliver) -> None:
        """Apply a plan's changes and run its step; hand the result to `deliver`, now or from another thread.

        Args:
            received_s: time.perf_counter() when the plan arrived.
        """

    def clear(self) -> None:
        """Forget all rows; keep weights and memory."""

    def close(self) -> None:
        """Deliver what is in flight, then stop."""


class Profiler(Protocol):
    """Traces steps on demand."""

    def start(self, prefix: str, execute: Execute) -> Execute:
        """Begin a trace; returns what runs a step from now on. Raises ProfileError."""

    def stop(self) -> None:
        """End it and write its file. Raises ProfileError."""


class Worker:
    """Connects a runner to the core."""

    def __init__(
        self,
        config: ProcessConfig,
        runner: Runner,
        pid: int,
        profiler: Profiler | None = None,
        pauses: GcPauses | None = None,
    ) -> None:
        """
        Args:
            profiler: None: this worker has nothing to trace.
            pauses: for garbage collection, to be told to the core; None: nobody measures them.
        """
        self.config = config
        self.runner = runner
        self.epoch = 0
        self._pid = pid
        self._profiler = profiler
        self._execute: Execute = runner.execute
        self._tracing = RowTracing(config.engine.scheduler.max_num_seqs, pid)
        self._pauses = pauses
        # Results may leave from the runner's own thread, and an end belongs to one thread: two ends.
        self._plans: DealerEnd[CoreToWorker] = DealerEnd(config.worker_address, CoreToWorker)
        self._results: DealerEnd[CoreToWorker] = DealerEnd(config.worker_address, CoreToWorker)

    def run(self) -> None:
        """Serve until the core says Shutdown."""
        self._plans.send(self.hello())
        while self.turn():
            pass

    def turn(self) -> bool:
        """Wait for a message and do what it says; False once told to leave."""
        message = self._plans.recv()
        match message:
            case StepPlan(epoch=epoch) if epoch == self.epoch:
                received_s = time.perf_counter()
                for spans in self._tracing.on_plan(message):
                    self._plans.send(spans)
                self._execute(message, received_s, self._deliver)
            case WorkerWelcome(epoch=epoch):
                self.runner.clear()
                self._tracing.clear()
                self.epoch = epoch
            case Call(call_id=call_id):
                error = self._call(message)
                self._plans.send(Reply(epoch=self.epoch, call_id=call_id, error=error))
            case Shutdown():
                for spans in self._tracing.end_all(self.epoch):
                    self._plans.send(spans)
                return False
            case Heartbeat() | StepPlan() | None:
                pass
        return True

    def _call(self, call: Call) -> str | None:
        """Do what was asked; returns what went wrong."""
        if not isinstance(call.body, StartProfile | StopProfile):
            return "not a call for workers"
        if self._profiler is None:
            return "a simulated worker cannot be profiled: it has no device"
        try:
            if isinstance(call.body, StartProfile):
                self._execute = self._profiler.start(call.body.prefix, self.runner.execute)
            else:
                self._execute = self.runner.execute
                self._profiler.stop()
        except ProfileError as error:
            return str(error)
        return None

    def hello(self) -> WorkerHello:
        runner = self.runner
        return WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            rank=self.config.rank,
            pid=self._pid,
            fingerprint=self.config.engine.fingerprint(),
            groups=runner.groups,
            num_blocks=runner.num_blocks,
            device=runner.device,
            weights_digest=self.config.engine.model.fingerprint,
        )

    def fail(self, problem: str) -> None:
        """Last words."""
        self._plans.send(WorkerFailed(epoch=self.epoch, rank=self.config.rank, message=problem))

    def close(self) -> None:
        self.runner.close()
        self._plans.close()
        self._results.close()

    def _deliver(self, result: StepResult) -> None:
        if self._pauses is not None and (pauses := self._pauses.take()):
            result = msgspec.structs.replace(result, gc_us=1e6 * sum(pauses))
        for spans in self._tracing.on_result(result):
            self._results.send(spans)  # first: who has read a request's end may leave
        self._results.send(result)


def decode_config(data: bytes) -> ProcessConfig:
    """The configuration that the launcher passed."""
    return msgspec.msgpack.decode(data, type=ProcessConfig)
