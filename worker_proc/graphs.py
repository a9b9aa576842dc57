"""CUDA graphs: which sizes are captured, capturing them, and replaying the one that fits.

A graph replays a fixed launch sequence on fixed addresses. What differs from step to step is in the step's
buffer on the device, so a graph of size n serves every step of at most n tokens or lines.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch

# Steps with chunks are captured up to this many tokens; each size costs time and memory at the start.
MAX_MIXED_TOKENS = 2048
# ... and this many chunks, which bounds the programs that find nothing to do.
MAX_MIXED_CHUNKS = 64


def batch_sizes(largest: int) -> list[int]:
    """Sizes of decode steps: at most a fifth of a step is padding from 65 lines on; `largest` is the last."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, largest, 64)]
    return [size for size in sizes if size < largest] + [largest]


def mixed_sizes(largest: int) -> list[int]:
    """Sizes in tokens of steps with chunks; those below `largest`, which is at least 1, and `largest` itself."""
    sizes = [16, 32, 64, 96, *range(128, 512, 64), *range(512, 1024, 128), *range(1024, largest, 256)]
    return [size for size in sizes if size < largest] + [largest]


def fitting(sizes: list[int], count: int) -> int:
    """The least size that holds `count`, which must not exceed the largest."""
    return sizes[bisect.bisect_left(sizes, count)]


@dataclass(slots=True)
class GraphCache:
    """Captured graphs by key, in one memory pool: they run one after another, so they share scratch memory."""

    device: torch.device
    _graphs: dict[Hashable, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _pool: Any = None
    _stream: torch.cuda.Stream | None = None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    def replay(self, key: Hashable) -> None:
        """Launch a captured graph on the current stream."""
        self._graphs[key].replay()

    def capture(self, key: Hashable, launch: Callable[[], object]) -> None:
        """Capture what `launch` launches. It runs once before, so that kernels are compiled and workspaces made."""
        if self._pool is None or self._stream is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            launch()
            graph = torch.cuda.CUDAGraph()
            # Other threads may wait for events meanwhile.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._graphs[key] = graph

    def forget(self, keep: Callable[[Hashable], bool]) -> None:
        """Drop graphs whose addresses no longer hold."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if keep(key)}
