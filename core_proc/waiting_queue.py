"""Requests that wait for a row, in the order in which they shall get one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from tercet.core_proc.request import Request


class WaitingQueue:
    """Sorted by arrival (fcfs) or by (priority, arrival); a preempted request keeps its place by arrival.

    A sorted list: arrivals nearly always go to the end, and a removal is one memmove.
    """

    def __init__(self, policy: str) -> None:
        self.key = attrgetter("order") if policy == "priority" else attrgetter("arrival")
        self._requests: list[Request] = []
        self._head = 0  # requests before it have left; cut off now and then

    def __len__(self) -> int:
        return len(self._requests) - self._head

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests[self._head :])

    def push(self, request: Request) -> None:
        insort(self._requests, request, lo=self._head, key=self.key)

    def peek(self) -> Request | None:
        return self._requests[self._head] if self._head < len(self._requests) else None

    def remove(self, request: Request) -> None:
        """Take a request out; the first one costs no move of the others."""
        if request is self.peek():
            self._head += 1
            if self._head > 64 and self._head * 2 > len(self._requests):
                del self._requests[: self._head]
                self._head = 0
            return
        index = bisect_left(self._requests, self.key(request), lo=self._head, key=self.key)
        assert self._requests[index] is request, "arrivals are unique"
        del self._requests[index]
