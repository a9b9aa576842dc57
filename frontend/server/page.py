"""The live page: static files of our own, and the figures that it draws.

All viewers of one server share one question to the core for each half second, however many they are.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Final

import msgspec

from tercet.frontend.async_llm import AsyncLLM
from tercet.ipc.messages import Stats
from tercet.ipc.telemetry import Metrics, StepTimes

FILES: Final = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
_POLICY: Final = (
    "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""The page loads nothing from elsewhere and runs no script but its own file."""

_FOLDER: Final = Path(__file__).parent / "page"
_FRESH_S: Final = 0.5
_RECENT_STEPS: Final = 120


class FrontendFigures(msgspec.Struct):
    """One attached frontend. `is_this` marks the server that answers."""

    name: str
    slot: int
    running: int
    waiting: int
    preparing: int
    serves_http: bool


class StepFigures(msgspec.Struct):
    """Recent steps as columns; times in microseconds."""

    step: list[int]
    schedule_us: list[float]
    launch_us: list[float]
    wait_us: list[float]
    output_us: list[float]
    tokens: list[int]


class PageFigures(msgspec.Struct):
    """What the page draws. Counters are totals: the page takes differences over `time_s`."""

    model: str
    time_s: float
    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    preemptions: int
    queues: dict[str, int]
    frontends: list[FrontendFigures]
    steps: StepFigures


def read_file(name: str) -> bytes:
    """One of `FILES`."""
    return (_FOLDER / name).read_bytes()


class FigureCache:
    """The page's figures, at most half a second old."""

    def __init__(self) -> None:
        self._figures: PageFigures | None = None
        self._taken_s = 0.0
        self._lock = asyncio.Lock()

    async def get(self, engine: AsyncLLM, model: str) -> PageFigures:
        """
        Raises:
            EngineError: there is no engine any more.
        """
        async with self._lock:
            if self._figures is None or time.monotonic() - self._taken_s > _FRESH_S:
                step = self._figures.steps.step[-1] if self._figures and self._figures.steps.step else 0
                stats, metrics = await engine.get_telemetry(max(step - _RECENT_STEPS, 0))
                self._figures = figures_of(stats, metrics, model)
                self._taken_s = time.monotonic()
            return self._figures


def figures_of(stats: Stats, metrics: Metrics, model: str) -> PageFigures:
    """The core's figures in the page's form."""
    frontends = [
        FrontendFigures(f.name, f.slot, f.num_running, f.num_waiting, f.num_preparing, f.serves_http)
        for f in metrics.frontends
    ]
    return PageFigures(
        model=model,
        time_s=stats.time_s,
        running=stats.num_running,
        waiting=stats.num_waiting,
        kv_cache_usage=stats.kv_cache_usage,
        prompt_tokens=stats.prompt_tokens,
        generation_tokens=stats.generation_tokens,
        prefix_cache_queries=stats.prefix_cache_queries,
        prefix_cache_hits=stats.prefix_cache_hits,
        preemptions=stats.num_preemptions,
        queues=metrics.queues,
        frontends=frontends,
        steps=_steps(metrics.steps),
    )


def _steps(times: StepTimes | None) -> StepFigures:
    if times is None:
        return StepFigures([], [], [], [], [], [])
    last = slice(-_RECENT_STEPS, None)
    phases = (times.schedule_us, times.launch_us, times.wait_us, times.output_us)
    schedule, launch, wait, output = (phase[last].round(1).tolist() for phase in phases)
    return StepFigures(
        times.step[last].tolist(), schedule, launch, wait, output, times.num_tokens[last].tolist()
    )
