"""Runs cases within a time limit: warm-up, runs, and every figure kept the moment it is there."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

from benchmarks.gpu import engines, peers, workloads
from benchmarks.gpu.clock import Clock, OutOfTimeError
from benchmarks.gpu.engines import Plan
from benchmarks.gpu.results import Figures, Measurement, Results, number
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.workloads import Case, Sizes
from tercet.errors import EngineClosedError, EngineDeadError, TercetError

NO_TIME = "the time limit"
_FAILURES = (TercetError, RuntimeError, ExceptionGroup)
_SLACK = 1.3  # a run may take so much longer than the one before it


class Suite:
    """Measures shapes. Everything that is measured or left out goes into `results`."""

    def __init__(self, plan: Plan, results: Results, clock: Clock, sizes: Sizes, loop: str = "auto") -> None:
        """
        Args:
            loop: event loop of AsyncLLM, see `engines.loop_factory`.
        """
        self.plan = plan
        self.results = results
        self.clock = clock
        self.sizes = sizes
        self._loop = loop
        self._current: Measurement | None = None  # that is being made

    def offline(
        self,
        shape: str,
        names: Iterable[str],
        *,
        variant: str = "",
        extra: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Workloads of `LLM`, all on one engine; should it die, the rest on another one.

        Args:
            variant: name of what `extra` and `env` change.
            extra: further engine arguments.
            env: environment variables of the engine.
        """
        arguments = self.plan.arguments(SHAPES[shape], engines.OFFLINE_LIMITS) | dict(extra or {})
        waiting = list(names)

        def measure() -> None:
            with engines.variables(env or {}), engines.offline(arguments) as (llm, ready_s):
                self._ready(shape, "LLM", arguments, ready_s, variant, env)
                while waiting:
                    for case in workloads.offline_cases(waiting.pop(0), llm, self.sizes):
                        self._measure(shape, case, variant)

        while waiting:
            before = len(waiting)
            self._guarded("/".join(waiting), shape, variant, measure)
            if len(waiting) == before or self.clock.left_s <= 0:
                break
        if waiting:
            why = NO_TIME if self.clock.left_s <= 0 else "no engine"
            self.results.skip(_label(shape, "/".join(waiting), variant), why)

    def serving(self, shape: str) -> None:
        """W5, on an engine of `AsyncLLM`."""
        arguments = self.plan.arguments(SHAPES[shape], engines.SERVING_LIMITS)

        def measure() -> None:
            with ExitStack() as stack:
                runner = stack.enter_context(asyncio.Runner(loop_factory=engines.loop_factory(self._loop)))
                with self.clock.bounded():
                    engine, ready_s = stack.enter_context(engines.serving(arguments, runner))
                self._ready(shape, "AsyncLLM", arguments, ready_s, "", None)
                run = self._in_time(runner)
                for case in workloads.serving_cases(engine, self.sizes, run):
                    self._measure(shape, case, "")

        if self.clock.left_s <= 0:
            self.results.skip(f"{shape} W5", NO_TIME)
        else:
            self._guarded("W5", shape, "", measure, signal=False)

    def _guarded(
        self, names: str, shape: str, variant: str, measure: Callable[[], None], signal: bool = True
    ) -> None:
        """Do it within the limit; a failure is noted, and what comes after goes on.

        Args:
            names: of the workloads.
            signal: cut off by a signal, which an event loop in this thread would swallow.
        """
        label = _label(shape, names, variant)
        self._current = None
        if self.clock.left_s <= 0:
            return
        print(f"{label}:", flush=True)
        try:
            with self.clock.bounded() if signal else nullcontext():
                measure()
        except OutOfTimeError:
            now = self._current
            cut = _label(shape, f"{now.workload} {now.case}".strip(), variant) if now else label
            self.results.skip(cut, f"{NO_TIME}, in the middle")
        except _FAILURES as error:
            self._fail(self._current or self.results.add(Measurement(shape, names, "", "", variant)), error)
        self.results.save()

    def _fail(self, measurement: Measurement, error: BaseException) -> None:
        cause = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
        measurement.error = " ".join(str(cause).split())[:300] or type(cause).__name__
        print(f"  error: {measurement.workload} {measurement.case}: {measurement.error}", flush=True)

    def _in_time(self, runner: asyncio.Runner) -> Callable[[Coroutine[None, None, Figures]], Figures]:
        async def within(coroutine: Coroutine[None, None, Figures]) -> Figures:
            try:
                async with asyncio.timeout(max(self.clock.left_s, 0)):
                    return await coroutine
            except TimeoutError:
                raise OutOfTimeError from None

        return lambda coroutine: runner.run(within(coroutine))

    def _ready(
        self,
        shape: str,
        kind: str,
        arguments: dict[str, Any],
        ready_s: float,
        variant: str,
        env: Mapping[str, str] | None,
    ) -> None:
        engine = {"shape": shape, "kind": kind, "variant": variant, "arguments": arguments, "env": env or {}}
        self.results.engines.append(engine)
        started = Measurement(shape, "start", kind, "from the call to ready", variant)
        started.runs.append({peers.READY: ready_s})
        self.results.add(started)
        print(f"  {kind} ready in {ready_s:.1f} s", flush=True)

    def _measure(self, shape: str, case: Case, variant: str) -> None:
        """A warm-up of the whole case, then its runs, as far as time allows."""
        measurement = Measurement(shape, case.workload, case.name, case.what, variant, case.batch)
        self._current = self.results.add(measurement)
        name = f"{shape} {case.workload} {case.name}".strip()
        took_s = 0.0
        for count in range(case.runs + 1):
            if self.clock.left_s < took_s * _SLACK:
                self.results.skip(f"{name}, run {count} of {case.runs}", NO_TIME)
                return
            started = time.monotonic()
            try:
                figures = case.run(count)
            except (EngineDeadError, EngineClosedError):
                raise
            except _FAILURES as error:
                self._fail(measurement, error)
                return
            took_s = time.monotonic() - started
            (measurement.runs if count else measurement.warmup).append(figures)
            self.results.save()
        shown = "; ".join(
            f"{metric} {', '.join(map(number, measurement.values(metric)))}" for metric in measurement.runs[0]
        )
        print(f"  {name}: {shown} ({took_s:.1f} s a run)", flush=True)


def _label(shape: str, names: str, variant: str) -> str:
    return f"{shape} {names}{f' ({variant})' if variant else ''}"


def sizes_of(scale: str) -> Sizes:
    """'full' or 'tiny'."""
    return workloads.TINY if scale == "tiny" else workloads.FULL


def settings_of(plan: Plan, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """What a results file says of how a program was run."""
    kept = {"device": plan.device, "tiny": plan.tiny, "tokenizer": plan.tokenizer, "extra": dict(plan.extra)}
    return {**kept, "sizes": dataclasses.asdict(sizes), **more}
