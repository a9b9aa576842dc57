"""Time of launches inside a replayed CUDA graph, so that the host does not count."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

_SAMPLES = 5
_SAMPLE_MS = 4.0


def capture(launch: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Run once, so that all is compiled, then capture."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Median time of one replay, microseconds."""
    repeats = 1
    elapsed = _replays_ms(graph, repeats)
    repeats = max(1, round(_SAMPLE_MS / max(elapsed, 1e-3)))
    return statistics.median(_replays_ms(graph, repeats) / repeats for _ in range(_SAMPLES)) * 1e3


def calls_us(calls: list[Callable[[], Any]]) -> float:
    """Median time of one of some calls in a graph that holds them all, microseconds."""

    def launch() -> None:
        for call in calls:
            call()

    return replay_us(capture(launch)) / len(calls)


def _replays_ms(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
