"""Ends the task that serves a request when there is nobody or no time left to serve it for.

    client leaves ──┐
    deadline passes ┼─▶ Guard.end(reason) ─▶ the task is cancelled ─▶ RequestEndedError(reason)
    server stops ───┘

A cancelled task closes its streams, which aborts the request wherever it is: being tokenized, queued, running.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, MutableMapping
from types import TracebackType
from typing import Any, Self, TypeAlias

Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Ended(enum.Enum):
    """Why a request ended before its time."""

    DISCONNECTED = "the client has left"
    DEADLINE = "the request took longer than it was given"
    SHUTDOWN = "the server is shutting down"


class RequestEndedError(Exception):
    """Raised where a `Guard` ends, in place of the cancellation."""

    def __init__(self, reason: Ended) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Guard:
    """`async with Guard(...)` around the work of a request; it ends that work when `end` is called.

    Args:
        receive: of ASGI, with the body read: its next message is the client's leaving.
        registry: holds the guard while it is entered, for whoever ends all of them.
        timeout_s: until the deadline; 0 is none.
    """

    __slots__ = ("_receive", "_registry", "_task", "_timeout_s", "_timer", "_watch", "reason")

    def __init__(self, receive: Receive, registry: set[Guard], timeout_s: float) -> None:
        self._receive = receive
        self._registry = registry
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self.reason: Ended | None = None

    def end(self, reason: Ended) -> None:
        """Cancel the work. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            self._task.cancel()

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        loop = task.get_loop()
        self._task = task
        self._watch = loop.create_task(self._watch_client())
        if self._timeout_s > 0:
            self._timer = loop.call_later(self._timeout_s, self.end, Ended.DEADLINE)
        self._registry.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        # No await here: a call of `end` must not find the task outside of the work that it is to end.
        self._registry.discard(self)
        self._watch.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self.reason is not None and kind is not None and issubclass(kind, asyncio.CancelledError):
            self._task.uncancel()
            raise RequestEndedError(self.reason) from None
        self.reason = Ended.DISCONNECTED  # too late to be ended

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.end(Ended.DISCONNECTED)
