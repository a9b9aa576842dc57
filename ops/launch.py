"""Launching Triton kernels, and compiling many of them at once before the first launch.

Triton compiles a kernel when it is first launched with arguments of some kind, about a second each, one after
another. Inside `compiling` a launch only notes that its kernel is wanted; what was noted compiles on several
threads (the compiler leaves Python's lock) and lands in Triton's cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_wanted: set[object] | None = None  # kinds of launches noted so far; None: launches launch


class Kernel:
    """A compiled-on-demand kernel: `kernel[grid](*arguments, **options)` launches it."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        if _wanted is None:
            launch: Callable[..., object] = self._function[grid]
            return launch
        return self._note

    def _note(self, *arguments: Any, **options: Any) -> None:
        assert _wanted is not None
        kind = (self._function, tuple(map(_kind, arguments)), tuple(options.items()))
        if kind not in _wanted:
            _wanted.add(kind)
            self._function.warmup(*arguments, grid=(1,), **options)


def _kind(argument: object) -> object:
    """What Triton may compile a kernel anew for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument


@contextmanager
def compiling(num_threads: int) -> Iterator[None]:
    """Compile what would be launched; leave when all of it is compiled. Other operations run as always.

    Args:
        num_threads: that compile at a time.
    """
    global _wanted
    from triton import AsyncCompileMode

    _wanted = set()
    try:
        with ThreadPoolExecutor(num_threads) as executor, AsyncCompileMode(executor):
            yield
    finally:
        _wanted = None
