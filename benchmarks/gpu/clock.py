"""A program's time limit: what does not fit is not begun, and what overruns is cut off."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTimeError(Exception):
    """The time limit was reached in the middle of something."""


class Clock:
    """Counts from its making. `bounded` works in the main thread only, since it uses SIGALRM."""

    def __init__(self, limit_s: float) -> None:
        self._end = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Raises OutOfTimeError inside the block when the limit is reached."""
        if self.left_s <= 0:
            raise OutOfTimeError
        before = signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, self.left_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError
