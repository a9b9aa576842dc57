"""Waking the tasks that wait for outputs: all of one message in one callback of the event loop.

A step's message is news to hundreds of tasks. With an asyncio.Future for each, every token costs a future, a
handle and a turn of the loop's machinery, which on asyncio's own loop is more than all else that the frontend
does for it. Here a task waits on a `TaskWaiter`, which lives as long as its stream, and a `TaskWaker` resumes
all tasks that a message woke, one after the other, in the order of the message.

A TaskWaiter is a future to asyncio.Task by the protocol that `asyncio.isfuture` documents: a task that is given
an object with `_asyncio_future_blocking` set leaves its wake-up with `add_done_callback`, and calls `cancel`
when it is cancelled. The wake-up takes any future that is done, whose result is then thrown or returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from typing import Any, Protocol, TypeAlias

_Wakeup: TypeAlias = Callable[["asyncio.Future[None]"], object]


class Waiter(Protocol):
    """Who waits for a request to have something new."""

    def wake(self) -> None:
        """There is something. Must not run the consumer now, but soon."""


class WaitPlace(Protocol):
    """Where a waiter is found by who wakes it: a request."""

    waiter: Waiter | None


class TaskWaker:
    """Resumes the tasks of one event loop. Made, and used, on its thread."""

    __slots__ = ("_done", "loop", "woken")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.woken: list[TaskWaiter] = []
        self._done: asyncio.Future[None] = loop.create_future()
        self._done.set_result(None)

    def resume_soon(self) -> None:
        """Resume the tasks of the waiters in `woken`, which the first one calls for."""
        self.loop.call_soon(self._resume_all)

    def _resume_all(self) -> None:
        waiters, self.woken = iter(self.woken), []
        done = self._done
        try:
            for waiter in waiters:
                wakeup = waiter.wakeup
                if wakeup is not None:  # else it was cancelled meanwhile
                    waiter.wakeup = None
                    waiter.context.run(wakeup, done)
        except BaseException:  # KeyboardInterrupt, SystemExit: tasks let these through to the loop's runner
            for waiter in waiters:
                waiter.wake()
            raise


class TaskWaiter:
    """`await` it until it is woken. For one task at a time, any number of times.

    Args:
        place: its `waiter` is this object for as long as a task waits.
        waker: of the event loop on which it is awaited.
    """

    __slots__ = ("_asyncio_future_blocking", "_loop", "_place", "_waker", "context", "wakeup")

    context: Context  # of the task, while it waits

    def __init__(self, place: WaitPlace, waker: TaskWaker) -> None:
        self._asyncio_future_blocking = False
        self._loop = waker.loop  # by which a task sees that it waits on its own loop
        self._place = place
        self._waker = waker
        self.wakeup: _Wakeup | None = None

    def __await__(self) -> Generator[TaskWaiter, None, None]:
        """
        Raises:
            RuntimeError: another task waits here.
        """
        place = self._place
        if place.waiter is not None:
            raise RuntimeError("the outputs of this request are being awaited elsewhere")
        place.waiter = self
        self._asyncio_future_blocking = True
        try:
            yield self
        finally:
            self.wakeup = None
            if place.waiter is self:  # not woken but cancelled, or closed: the place is free again
                place.waiter = None

    def wake(self) -> None:
        waker = self._waker
        if not waker.woken:
            waker.resume_soon()
        waker.woken.append(self)

    # ---- what asyncio.Task calls

    def add_done_callback(self, wakeup: _Wakeup, *, context: Context) -> None:
        self.wakeup, self.context = wakeup, context

    def cancel(self, msg: Any = None) -> bool:
        """Throw CancelledError into the task; False if it is not waiting any more."""
        wakeup, self.wakeup = self.wakeup, None
        if wakeup is None:
            return False
        cancelled: asyncio.Future[None] = self._loop.create_future()
        cancelled.cancel(msg)
        self._loop.call_soon(wakeup, cancelled, context=self.context)
        return True
