"""A thread that owns the processes of one engine: starts them, waits until they are ready, watches, stops.

Knows names, modules and exit codes, not what the processes do. When one dies after the start the others are
stopped and `on_death` is told; when one cannot start, `start` raises and nothing is left running.
"""

from __future__ import annotations

import os
import selectors
import threading
import time
from collections.abc import Callable, Sequence

from tercet.ipc.child import Failed, Progress, Ready
from tercet.ipc.errors import CannotStartError
from tercet.ipc.process import Child, ProcessSpec

_FAULT_TIMEOUT_S = 2.0  # for the others to leave once one has died


class Supervisor:
    """Owns a set of child processes from one thread. `start` and `stop` may be called from any thread."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        on_progress: Callable[[str, Progress], None] | None = None,
        on_death: Callable[[str], None] | None = None,
        ready_timeout_s: float = 600.0,
    ) -> None:
        """
        Args:
            specs: children in the order in which they are started; they are stopped in the same order, so
                the one that tells the others to leave comes first. All must report Ready.
            on_progress: called from this thread with a child's name and what it reports while starting.
            on_death: called from this thread, once, with words, when a child died after the start.
            ready_timeout_s: without any report for so long, the start has failed.
        """
        self._pid = os.getpid()
        self._specs = specs
        self._on_progress = on_progress
        self.on_death = on_death
        self._ready_timeout_s = ready_timeout_s
        self._children: list[Child] = []
        self._problems: dict[Child, Failed] = {}  # last words of children that said why they end
        self._stopped = False
        self._stop_timeout_s = 5.0
        self._wake_lock = threading.Lock()  # so that `stop` never writes to a descriptor closed meanwhile
        self._wake: tuple[int, int] | None = None
        self._settled = threading.Event()
        self._error: CannotStartError | None = None
        self._thread = threading.Thread(target=self._run, name="tercet-supervisor", daemon=True)

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {child.spec.name: child.pid for child in self._children}

    def start(self) -> None:
        """Start all children and wait until all are ready.

        Raises:
            CannotStartError: one ended or fell silent before it was ready, or `stop` was called; all are gone then.
        """
        with self._wake_lock:
            if self._stopped:
                raise CannotStartError("supervisor", "stopped while starting")
            self._wake = os.pipe()
            self._thread.start()
        try:
            self._settled.wait()
        except BaseException:  # Ctrl-C while loading
            self.stop()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop the children: SIGTERM in order, SIGKILL for whoever is there after `timeout_s`. Idempotent, and for
        good: a `start` that comes later raises.

        Does nothing in a forked child, which has the pipe that wakes the thread but not the thread.
        """
        if os.getpid() != self._pid:
            return
        self._stop_timeout_s = timeout_s
        with self._wake_lock:
            self._stopped = True
            if self._wake is not None:
                os.write(self._wake[1], b"x")
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                assert self._wake is not None
                selector.register(self._wake[0], selectors.EVENT_READ)
                self._spawn(selector)
                if self._await_ready(selector):
                    self._settled.set()
                    self._watch(selector)
        except Exception as error:  # no pid or descriptor left, or a callback of the caller's
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._tear_down()
            self._settled.set()

    def _fail(self, problem: str) -> None:
        if not self._settled.is_set():
            self._error = CannotStartError("supervisor", problem)
        elif self.on_death is not None:
            self.on_death(f"supervisor: {problem}")

    def _spawn(self, selector: selectors.BaseSelector) -> None:
        for spec in self._specs:
            child = Child(spec)
            self._children.append(child)
            selector.register(child.pidfd, selectors.EVENT_READ, child)
            selector.register(child.report_fd, selectors.EVENT_READ, child)

    def _await_ready(self, selector: selectors.BaseSelector) -> bool:
        waiting = set(self._children)
        deadline = time.monotonic() + self._ready_timeout_s
        while waiting:
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                silent = ", ".join(child.spec.name for child in waiting)
                self._error = CannotStartError(silent, f"no sign of life for {self._ready_timeout_s:.0f} s")
                return False
            if any(key.data is None for key, _ in events):
                self._error = CannotStartError("supervisor", "stopped while starting")
                return False
            deadline = time.monotonic() + self._ready_timeout_s
            for child in {key.data for key, _ in events}:
                if not self._read_reports(child, waiting):
                    return False
        return True

    def _read_reports(self, child: Child, waiting: set[Child]) -> bool:
        ended = child.poll() is not None  # asked first: what it said before is then all read below
        for report in child.reports():
            match report:
                case Progress():
                    if self._on_progress is not None:
                        self._on_progress(child.spec.name, report)
                case Ready():
                    waiting.discard(child)
                case Failed():
                    self._problems[child] = report
        last_words = self._problems.get(child)
        if last_words is None and not ended:
            return True
        if last_words is None:
            last_words = Failed(f"{child.describe_exit()} while starting")
        self._error = CannotStartError(child.spec.name, last_words.problem, last_words.field)
        return False

    def _watch(self, selector: selectors.BaseSelector) -> None:
        while True:
            for key, _ in selector.select():
                if key.data is None:  # woken by stop
                    return
                child: Child = key.data
                ended = child.poll() is not None
                for report in child.reports():
                    if isinstance(report, Failed):
                        self._problems[child] = report
                if ended:
                    words = [f"{child.spec.name} (pid {child.pid}) {child.describe_exit()}"]
                    words += [report.problem for report in [self._problems.get(child)] if report is not None]
                    if self.on_death is not None:
                        self.on_death(": ".join(words))
                    for other in self._children:
                        other.terminate(fault=True)
                    self._stop_timeout_s = min(self._stop_timeout_s, _FAULT_TIMEOUT_S)
                    return
                if key.fd == child.report_fd:
                    selector.unregister(child.report_fd)  # its end-of-file would wake us for ever

    def _tear_down(self) -> None:
        deadline = time.monotonic() + self._stop_timeout_s
        for child in self._children:
            child.terminate()
            if child is self._children[0]:
                child.wait(max(0.05, deadline - time.monotonic()))  # it tells the others to leave
        for child in self._children:
            if not child.wait(max(0.05, deadline - time.monotonic())):
                child.kill()
                child.wait(5.0)
            child.close()
        with self._wake_lock:
            assert self._wake is not None
            for fd in self._wake:
                os.close(fd)
            self._wake = None
