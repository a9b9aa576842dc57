"""What one rendering of a chat template may use: see `template_sandbox`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

_WORK_PER_CHAR: Final = 16  # of the longest text: what may be made in all, in units of a character
CONTAINERS: Final[tuple[type[Any], ...]] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.items()),
    type({}.keys()),
    type({}.values()),
)


class TemplateLimitError(Exception):
    """A template makes too much, or takes too long."""


class Budget:
    """What one rendering may use.

    Args:
        max_chars: of one text; sixteen times as much may be made in all.
        max_s: seconds from now.
    """

    __slots__ = ("_deadline", "_left", "_max_s", "max_chars")

    def __init__(self, max_chars: int, max_s: float) -> None:
        self.max_chars = max_chars
        self._max_s = max_s
        self._left = max(max_chars, 1 << 20) * _WORK_PER_CHAR
        self._deadline = time.monotonic() + max_s

    def charge(self, units: int) -> None:
        """Before the work is done. Raises TemplateLimitError."""
        self._left -= units
        if self._left < 0:
            raise TemplateLimitError("the chat template makes too much")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"rendering the chat took longer than {self._max_s:g} s")

    def text(self, num_chars: int) -> None:
        """As `charge`, for a text that is to be made."""
        if num_chars > self.max_chars:
            raise TemplateLimitError(f"the chat is over {self.max_chars} characters long")
        self.charge(num_chars)

    def walk(self, value: Any) -> int:
        """Characters in a value as text, about; charged. Shared parts count each time, as they are walked."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, CONTAINERS):
            return 16
        total, stack = 0, [value]
        while stack:
            one = stack.pop()
            total += 16
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, CONTAINERS):
                total += 16 * len(one)
                if total <= self.max_chars:
                    stack.extend(one)
                    if isinstance(one, dict):
                        stack.extend(one.values())
            if total > self.max_chars:
                raise TemplateLimitError("the chat template makes too large a value")
        self.charge(total)
        return total


_budget: ContextVar[Budget] = ContextVar("_budget")


@contextmanager
def within(budget: Budget) -> Iterator[None]:
    """Templates that are compiled or rendered inside have this budget."""
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


current_budget = _budget.get
