"""`tercet serve --api-server-count N`: one engine and N API servers, children of a process that serves nothing."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from typing import Any

import msgspec

from tercet.config import EngineConfig
from tercet.errors import EngineDeadError, StartupError, TercetError
from tercet.frontend.launcher import EngineProcesses
from tercet.frontend.server.child import ChildConfig
from tercet.frontend.server.engines import write_progress
from tercet.frontend.server.fleet import Fleet
from tercet.frontend.server.serving import LAST_WORDS_S, bind, url_of
from tercet.frontend.server.settings import ListenSettings, ServerSettings
from tercet.frontend.status_line import StatusLine
from tercet.ipc.address import check_address
from tercet.ipc.errors import CannotStartError
from tercet.ipc.process import ProcessSpec
from tercet.ipc.runtime_dir import RuntimeDir


def run_fleet(
    settings: ServerSettings,
    listen: ListenSettings,
    count: int,
    *,
    config: EngineConfig | None,
    address: str | None,
    log_stats: bool,
) -> int:
    """Serve until a signal; returns 0.

    Args:
        count: API servers.
        config: of the engine to start; None for one that runs at `address`.

    Raises:
        TercetError: something cannot start, or the engine has died.
    """
    sock = bind(listen)  # holds the port, and says which one it is; children have sockets of their own
    url = url_of(listen, sock)
    listen = msgspec.structs.replace(listen, port=sock.getsockname()[1])
    directory = RuntimeDir()
    try:
        return _Run(settings, listen, count, config, address, log_stats, directory).serve(url)
    finally:
        directory.close()
        sock.close()


class _Run:
    """Engine and fleet together; what happens to them arrives in one queue."""

    def __init__(
        self,
        settings: ServerSettings,
        listen: ListenSettings,
        count: int,
        config: EngineConfig | None,
        address: str | None,
        log_stats: bool,
        directory: RuntimeDir,
    ) -> None:
        self._listen = listen
        self._asked = False
        # None: a signal; True: the engine runs; an error: it does not, or no more.
        self._events: queue.SimpleQueue[TercetError | bool | None] = queue.SimpleQueue()
        self._status = StatusLine()
        self._progress_path = directory.path / "progress.json"
        self._engine = None
        if config is not None:
            self._engine = EngineProcesses(config, progress=self._on_progress)
            self._engine.on_death = lambda problem: self._events.put(
                EngineDeadError(f"the engine has died: {problem}")
            )
        self._address = self._engine.address if self._engine is not None else check_address(address or "")
        self._model = config.model.served_model_name[0] if config is not None else "the engine"
        self._fleet = Fleet([self._spec(index, settings, log_stats) for index in range(count)])

    def _spec(self, index: int, settings: ServerSettings, log_stats: bool) -> ProcessSpec:
        listen = self._listen
        if index:  # the admin routes, and the line of statistics, are one server's
            listen = msgspec.structs.replace(listen, admin_uds=None, admin_port=None)
            log_stats = False
        config = ChildConfig(
            name=f"api {index}",
            settings=settings,
            listen=listen,
            address=self._address,
            log_stats=log_stats,
            progress_path=None if self._engine is None else str(self._progress_path),
        )
        return ProcessSpec(config.name, "tercet.frontend.server", msgspec.msgpack.encode(config))

    def _on_progress(self, words: str) -> None:
        self._status.show(words)
        write_progress(self._progress_path, words)

    def serve(self, url: str) -> int:
        before = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        starting = threading.Thread(target=self._start_engine, name="tercet-start", daemon=True)
        try:
            with self._status:
                self._start_fleet()
                starting.start()
                return self._wait(url)
        finally:
            timeout_s = self._listen.shutdown_timeout_s + LAST_WORDS_S + 2.0
            self._fleet.stop(timeout_s)
            if self._engine is not None:
                self._engine.stop()
            if starting.is_alive():
                starting.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start_fleet(self) -> None:
        try:
            self._fleet.start()
        except CannotStartError as error:
            raise StartupError(str(error)) from None

    def _start_engine(self) -> None:
        try:
            if self._engine is not None:
                self._engine.start()
            self._events.put(True)
        except TercetError as error:
            self._events.put(error)

    def _wait(self, url: str) -> int:
        while True:
            event = self._events.get()
            if event is None:
                return 0
            if isinstance(event, TercetError):
                raise event
            self._status.clear()
            print(f"serving {self._model} at {url}", flush=True)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        print("tercet: stopping; a second signal stops at once", file=sys.stderr, flush=True)
        self._events.put(None)
