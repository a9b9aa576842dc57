"""A core and a worker over real sockets in this process: stepped by hand, or each on a thread of its own.

What the core process does around its loop (configuration, readiness, signals) is left out. Tests step this engine
to count what a turn costs, and run it where they set a limit that no real engine would have.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tercet.config import EngineConfig, ProcessConfig
from tercet.core_proc.core import Core
from tercet.core_proc.outbox import UNREAD_MESSAGES
from tercet.ipc.channel import RouterEnd
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    FrontendToCore,
    WorkerHello,
    WorkerToCore,
    WorkerWelcome,
)
from tercet.worker_proc.simulated_runner import SimulatedRunner
from tercet.worker_proc.worker import Runner, Worker
from tests.core_proc.harness import make_config, make_scheduler

TIMEOUT_MS = 20_000


class LocalEngine:
    """Made ready to take frontends at `address`; `close` lets go of everything."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        make_runner: Callable[[ProcessConfig], Runner] = SimulatedRunner,
        **sizes: Any,
    ) -> None:
        self.config = config or make_config(**sizes)
        self._folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        self._stop_r, self._stop_w = os.pipe()
        self._threads: list[threading.Thread] = []
        self.errors: list[BaseException] = []
        process = ProcessConfig(
            engine=self.config,
            worker_address=f"ipc://{self._folder}/worker",
            frontend_address=f"ipc://{self._folder}/core",
            runtime_dir=str(self._folder),
            epoch=1,
        )
        self.address = process.frontend_address
        self.workers = RouterEnd[WorkerToCore](process.worker_address, WorkerToCore)
        self.worker = Worker(process, make_runner(process), os.getpid())
        peer = self._shake_hands()
        self.frontends = RouterEnd[FrontendToCore](
            process.frontend_address, FrontendToCore, send_queue=UNREAD_MESSAGES
        )
        scheduler = make_scheduler(self.config)
        self.core = Core(self.config, scheduler, peer, self.workers, self.frontends, self._stop_r)

    def _shake_hands(self) -> bytes:
        self.worker._plans.send(self.worker.hello())
        self.wait_readable(self.workers)
        received = self.workers.recv_nowait()
        assert received is not None
        peer, hello = received
        assert isinstance(hello, WorkerHello)
        self.workers.send(peer, WorkerWelcome(epoch=1, protocol_version=PROTOCOL_VERSION))
        assert self.worker.turn()
        return peer

    @staticmethod
    def wait_readable(end: Any) -> None:
        """Wait until a message has come to an end, so that who reads it next need not wait."""
        assert end._socket.poll(TIMEOUT_MS), "nothing came"

    # ------------------------------------------------------------------------------ stepped by hand

    def core_turn(self) -> None:
        """One turn of the overlapped loop."""
        self.core.turn_overlapped()

    def worker_turn(self) -> None:
        """One message of the worker's, which must have been sent."""
        self.wait_readable(self.worker._plans)
        assert self.worker.turn()

    # ------------------------------------------------------------------------------ on threads

    def start(self) -> LocalEngine:
        for name, loop in (("core", self._run_core), ("worker", self._run_worker)):
            thread = threading.Thread(target=self._guard, args=(loop,), name=name)
            thread.start()
            self._threads.append(thread)
        return self

    def _run_core(self) -> None:
        try:
            self.core.run()
        finally:
            self.core.close("the test is over", fault=False)

    def _run_worker(self) -> None:
        while self.worker.turn():
            pass

    def _guard(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.write(self._stop_w, b"x")
        for thread in self._threads:
            thread.join(TIMEOUT_MS / 1000)
        self.worker.close()
        self.frontends.close()
        self.workers.close()
        for fd in (self._stop_r, self._stop_w):
            os.close(fd)
        shutil.rmtree(self._folder)
        assert not self.errors, self.errors
