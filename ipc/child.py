"""The child's side of a process that Tercet starts: its configuration, its readiness, its parent's death.

Call `adopt()` (or `tie`) first of all, before heavy imports: from then on the process ends with its parent,
whatever it is doing. The parent's side is `process.py`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn, Self

import msgspec

LEAVE = b"l"
LEAVE_AFTER_FAULT = b"f"
_PR_SET_PDEATHSIG = 1
_ORPHAN_EXIT_CODE = 64
_ORPHAN_GRACE_S = 1.0  # for an orderly leave, which removes socket files


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """child -> parent: still starting. `done` of `total` in this phase, 0 of 0 where it has no measure."""

    phase: str
    done: int = 0
    total: int = 0


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """child -> parent: started."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """child -> parent: cannot start, or is about to die; the process exits after it.

    `field` is the engine argument whose value is the cause, where one is.
    """

    problem: str
    field: str = ""


Report = Progress | Ready | Failed


class ChildProcess:
    """What a process knows of its parent."""

    def __init__(self, config: bytes, life_fd: int, report_fd: int) -> None:
        self.config = config
        self.life_fd = life_fd
        self._report_fd = report_fd
        self._encoder = msgspec.json.Encoder()
        self._orphaned = False
        self._fault = False
        self._dismissed = threading.Event()  # by a parent that lives, or by its death
        self.last_act: Callable[[], None] | None = None  # of an orphan that did not leave in order in time

    @classmethod
    def from_arguments(cls) -> Self:
        """What the parent passed on the command line. `tie` comes next.

        Raises:
            SystemExit: the process was not started by Tercet.
        """
        if len(sys.argv) != 2 or not sys.argv[1].startswith("--fds="):
            raise SystemExit("this module is started by Tercet itself; see `tercet --help`")
        config_fd, life_fd, report_fd = (int(fd) for fd in sys.argv[1].removeprefix("--fds=").split(","))
        for fd in (life_fd, report_fd):
            os.set_inheritable(fd, False)
        with os.fdopen(config_fd, "rb") as file:
            return cls(file.read(), life_fd, report_fd)

    def tie(self, death_signal: signal.Signals) -> None:
        """Tie this process's life to its parent's, twice.

        A pipe's end-of-file says that the parent is gone: a thread watches it, sends this process `death_signal`
        and ends it a second later. The kernel sends the same signal, should Python be stuck.

        Args:
            death_signal: SIGTERM lets the process leave in order. Until it installs a handler of its own, the
                signal raises SystemExit in the main thread, from within this call already.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; Ctrl-C must not race with it
        if death_signal == signal.SIGTERM:
            signal.signal(signal.SIGTERM, _leave)
        watch = threading.Thread(
            target=self._watch_parent, args=(death_signal,), name="parent-watch", daemon=True
        )
        watch.start()
        # After the thread: whoever is told by this signal must be able to ask whether the parent is gone.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(death_signal))

    def is_orphaned(self, timeout_s: float = _ORPHAN_GRACE_S) -> bool:
        """Whether the parent is gone, so that nobody else will clean up after this process.

        For a process that is leaving: it waits, at most so long, to know. The signal of a parent's death may come
        before the end-of-file, since it is sent when the first of the parent's threads is gone.
        """
        self._dismissed.wait(timeout_s)
        return self._orphaned

    def is_fault(self) -> bool:
        """Whether this process leaves because its parent or a sibling died, not in good order; waits likewise."""
        self._dismissed.wait(_ORPHAN_GRACE_S)
        return self._fault or self._orphaned

    def report(self, report: Report) -> None:
        """Tell the parent; ignored once it is gone."""
        try:
            os.write(self._report_fd, self._encoder.encode(report) + b"\n")
        except OSError:
            pass

    def _watch_parent(self, death_signal: signal.Signals) -> None:
        while word := os.read(self.life_fd, 1):  # the parent asks this process to leave
            self._fault |= word == LEAVE_AFTER_FAULT
            self._dismissed.set()
        self._orphaned = True
        self._dismissed.set()
        os.kill(os.getpid(), death_signal)
        threading.Event().wait(_ORPHAN_GRACE_S)
        try:
            if self.last_act is not None:
                self.last_act()
        finally:
            os._exit(_ORPHAN_EXIT_CODE)


def adopt() -> ChildProcess:
    """Take over what the parent passed, and die with it at once, whatever this process is doing.

    Raises:
        SystemExit: the process was not started by Tercet.
    """
    child = ChildProcess.from_arguments()
    child.tie(signal.SIGKILL)
    return child


def _leave(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # pipe and kernel both send it: once is enough
    raise SystemExit(0)
