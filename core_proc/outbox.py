"""Messages on their way to frontends: into the socket, or into a backlog where a frontend does not read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

import msgspec

from tercet.core_proc.backlog import Backlog
from tercet.core_proc.frontends import Frontend
from tercet.ipc.channel import RouterEnd
from tercet.ipc.errors import PeerBusyError, PeerGoneError
from tercet.ipc.messages import FrontendToCore

UNREAD_MESSAGES: Final = 256  # in a frontend's socket; what comes after them is merged
MAX_BACKLOG_BYTES: Final = 16 * 1024 * 1024  # of one frontend; beyond, its requests end
"""Some four million tokens without log-probabilities: minutes of a full batch."""

DETACH_FACTOR: Final = 3  # at so many times that, of a frontend that only asks and never reads, it is let go
_FLUSH_MESSAGES: Final = 64  # of one frontend at a time, so that the others' steps do not wait
_RETRY_MIN_S: Final = 0.002
_RETRY_MAX_S: Final = 0.1


class Outbox:
    """Sends to frontends in order, without waiting for any of them."""

    def __init__(self, end: RouterEnd[FrontendToCore]) -> None:
        self._end = end
        self._behind: dict[int, Frontend] = {}  # those with a backlog, by slot
        self._retry_s = _RETRY_MIN_S
        self._retry_at = 0.0

    @property
    def has_backlog(self) -> bool:
        return bool(self._behind)

    @property
    def wait_s(self) -> float:
        """How long to wait before `retry`; asked for where there is a backlog."""
        return max(0.0, self._retry_at - time.monotonic())

    def send(self, frontend: Frontend, message: msgspec.Struct) -> None:
        """Send, or keep for later where the frontend does not read.

        Raises:
            PeerGoneError: it has left.
        """
        if frontend.backlog is None:
            try:
                self._end.send(frontend.peer, message)
                return
            except PeerBusyError:
                frontend.backlog = Backlog()
                self._behind[frontend.slot] = frontend
        frontend.backlog.put(message)

    def forget(self, frontend: Frontend) -> None:
        """Drop what waits for a frontend that has left."""
        frontend.backlog = None
        self._behind.pop(frontend.slot, None)

    def overrun(self) -> Iterator[tuple[Frontend, bool]]:
        """Frontends whose backlog is beyond its bound for the first time, and whether beyond the last one."""
        for frontend in list(self._behind.values()):
            assert frontend.backlog is not None
            size = frontend.backlog.num_bytes
            if size > DETACH_FACTOR * MAX_BACKLOG_BYTES:
                yield frontend, True
            elif size > MAX_BACKLOG_BYTES and not frontend.is_overrun:
                frontend.is_overrun = True
                yield frontend, False

    def retry(self, *, at_once: bool = False) -> list[Frontend]:
        """Send what sockets take again, at growing intervals while they take nothing; returns who has left."""
        now = time.monotonic()
        if now < self._retry_at and not at_once:
            return []
        gone, sent = [], False
        for frontend in list(self._behind.values()):
            try:
                sent |= self._flush(frontend)
            except PeerGoneError:
                gone.append(frontend)
        self._retry_s = _RETRY_MIN_S if sent else min(2 * self._retry_s, _RETRY_MAX_S)
        self._retry_at = now + self._retry_s
        return gone

    def _flush(self, frontend: Frontend) -> bool:
        """Send the first messages of a backlog; returns whether any went."""
        backlog = frontend.backlog
        assert backlog is not None
        for count in range(_FLUSH_MESSAGES):
            if (message := backlog.first()) is None:
                self.forget(frontend)
                frontend.is_overrun = False
                return True
            try:
                self._end.send(frontend.peer, message)
            except PeerBusyError:
                return count > 0
            backlog.pop()
            frontend.is_overrun &= backlog.num_bytes > MAX_BACKLOG_BYTES
        return True
