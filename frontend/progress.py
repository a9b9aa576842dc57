"""A progress bar for calls that take long, with the speed so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeAlias

UseTqdm: TypeAlias = bool | Callable[..., Any]
"""False for no bar, True for tqdm's, or what makes one (called as tqdm is)."""


class Progress:
    """Counts finished requests. Use as a context manager; `finished` may be called from another thread."""

    def __init__(self, use_tqdm: UseTqdm, total: int, description: str) -> None:
        self._bar = None if use_tqdm is False else _make_bar(use_tqdm, total, description)
        self._started_s = time.monotonic()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    def finished(self, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """One more request is finished."""
        if self._bar is None:
            return
        self._num_prompt_tokens += num_prompt_tokens
        self._num_output_tokens += num_output_tokens
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_prompt_tokens / elapsed_s:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed_s:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _make_bar(use_tqdm: UseTqdm, total: int, description: str) -> Any:
    if use_tqdm is not True:
        assert callable(use_tqdm)
        make = use_tqdm
    else:
        from tqdm import tqdm

        class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
            monitor_interval = 0  # no thread of tqdm's that would outlive us

        make = Bar
    return make(total=total, desc=description, dynamic_ncols=True, postfix="est. speed …")
