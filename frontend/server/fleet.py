"""Several API servers on one port, each a process and an ordinary frontend of one engine.

They listen on sockets of their own with SO_REUSEPORT, among which the kernel shares out connections. One that
dies is started again, after a pause that doubles with each death in a row; the others do not notice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from tercet.ipc.errors import CannotStartError
from tercet.ipc.process import ProcessSpec
from tercet.ipc.supervisor import Supervisor
from tercet.log import get_logger

logger = get_logger(__name__)

FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 30.0
LASTING_S: Final = 60.0  # a server that lived for so long has its deaths forgiven


@dataclass(slots=True)
class _Member:
    spec: ProcessSpec
    supervisor: Supervisor | None = None
    started_s: float = 0.0
    num_deaths: int = 0  # in a row


class Fleet:
    """The processes. A thread of its own starts them again; `start` and `stop` are for another one."""

    def __init__(self, specs: Sequence[ProcessSpec], *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._members = [_Member(spec) for spec in specs]
        self._first_pause_s = first_pause_s
        self._deaths: queue.SimpleQueue[_Member | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tend, name="tercet-fleet", daemon=True)
        self._lock = threading.Lock()
        self._stopping = False

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, of those that run."""
        found: dict[str, int] = {}
        for member in self._members:
            if member.supervisor is not None:
                found |= member.supervisor.pids
        return found

    def start(self) -> None:
        """Start all and wait until all listen.

        Raises:
            CannotStartError: one cannot; none is left running.
        """
        try:
            _all_at_once([partial(self._start, member) for member in self._members])
        except BaseException:
            self.stop(1.0)
            raise
        self._thread.start()

    def _start(self, member: _Member) -> None:
        supervisor = Supervisor([member.spec], on_death=lambda problem: self._on_death(member, problem))
        with self._lock:
            if self._stopping:
                return
            member.supervisor, member.started_s = supervisor, time.monotonic()
        supervisor.start()

    def _on_death(self, member: _Member, problem: str) -> None:
        if not self._stopping:
            logger.error("%s; it is started again", problem)
            self._deaths.put(member)

    def _tend(self) -> None:
        while (member := self._deaths.get()) is not None:
            lived_s = time.monotonic() - member.started_s
            member.num_deaths = 1 if lived_s >= LASTING_S else member.num_deaths + 1
            pause_s = min(LONGEST_PAUSE_S, self._first_pause_s * 2 ** (member.num_deaths - 1))
            timer = threading.Timer(pause_s, self._restart, (member,))
            timer.daemon = True
            timer.start()

    def _restart(self, member: _Member) -> None:
        try:
            self._start(member)
        except CannotStartError as error:
            self._on_death(member, str(error))

    def stop(self, timeout_s: float) -> None:
        """Ask all to leave, and wait at most so long before they are killed. Idempotent."""
        with self._lock:
            self._stopping = True
        self._deaths.put(None)
        found = [member.supervisor for member in self._members if member.supervisor is not None]
        _all_at_once([partial(one.stop, timeout_s) for one in found])


def _all_at_once(functions: Sequence[Callable[[], None]]) -> None:
    """Run these side by side; raises what one of them raised, once all have ended."""
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
