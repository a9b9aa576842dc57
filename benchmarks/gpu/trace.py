"""Reads a worker's trace (`start_profile`) as steps: what the device ran for each, and what the host did.

A trace is a Chrome trace of torch's profiler. The worker marks each step with an annotation `step N decode` or
`step N prefill` on the thread that launches. Work on the device belongs to the step during which its launch was
called, found by the correlation id that both carry; all kernels of a replayed CUDA graph carry the id of the one
cudaGraphLaunch. Times are microseconds.
"""

from __future__ import annotations

import bisect
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_STEP = re.compile(r"step (\d+) (decode|prefill)")
_DEVICE: Final = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_CALLS: Final = frozenset(("cuda_runtime", "cuda_driver"))
# Calls that hold the host until the device has got somewhere.
_SYNCS: Final = frozenset(
    f"{prefix}{name}"
    for prefix in ("cuda", "cu")
    for name in ("StreamSynchronize", "DeviceSynchronize", "CtxSynchronize", "EventSynchronize", "Memcpy")
)

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Event:
    """A complete event of the trace."""

    name: str
    category: str
    start: float
    duration: float
    thread: object
    arguments: Mapping[str, Any]

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(slots=True)
class Step:
    """One step. Counts of calls are those of the launching thread, within the step's annotation."""

    number: int
    kind: str  # decode or prefill
    start: float  # of the host's part
    end: float
    device: list[Event] = field(default_factory=list)  # what it made the device do, by start
    calls: list[Event] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)  # annotation inside the step -> time

    @property
    def host_us(self) -> float:
        return self.end - self.start

    @property
    def launches(self) -> int:
        return sum("Launch" in call.name for call in self.calls)

    @property
    def graph_launches(self) -> int:
        return sum("GraphLaunch" in call.name for call in self.calls)

    @property
    def syncs(self) -> list[str]:
        """Names of the calls that waited for the device."""
        return [call.name for call in self.calls if call.name.partition("_")[0] in _SYNCS]

    @property
    def kernels(self) -> int:
        return sum(event.category == "kernel" for event in self.device)

    def copies(self, direction: str) -> int:
        """Number of copies: direction 'HtoD', 'DtoH' or 'DtoD'."""
        return sum(event.category == "gpu_memcpy" and direction in event.name for event in self.device)


@dataclass(frozen=True, slots=True)
class Gap:
    """From the first work of a step on the compute stream to the first work of the next one."""

    number: int  # of the first of the two steps
    period_us: float
    busy_us: float  # the compute stream ran something
    between_us: float  # idle after the step's last work, before the next step's first

    @property
    def within_us(self) -> float:
        """Idle between kernels of one step: launch latencies, dependencies."""
        return self.period_us - self.busy_us - self.between_us


@dataclass(slots=True)
class Trace:
    """All steps of a trace, in order."""

    steps: list[Step]
    stream: object = None  # the compute stream: the one with the most kernel time; None without a device

    def gaps(self) -> list[Gap]:
        """One for each decode step that is followed by another one."""
        found = []
        for step, following in zip(self.steps, self.steps[1:], strict=False):
            if step.kind == following.kind == "decode" and following.number == step.number + 1:
                mine, theirs = self._compute(step), self._compute(following)
                if mine and theirs:
                    found.append(_gap(step.number, mine, theirs[0][0]))
        return found

    def _compute(self, step: Step) -> list[Interval]:
        return [(e.start, e.end) for e in step.device if e.arguments.get("stream") == self.stream]


def read(path: Path) -> Trace:
    """The steps of a trace file, gzipped or not.

    Raises:
        ValueError: it is no Chrome trace, or holds no step.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        data = json.load(file)
    events = data.get("traceEvents") if isinstance(data, dict) else data
    if not isinstance(events, list):
        raise ValueError(f"{path}: no Chrome trace: it has no list of traceEvents")
    trace = parse(events)
    if not trace.steps:
        raise ValueError(f"{path}: holds no step; it must come from start_profile of a worker that ran some")
    return trace


def parse(events: Iterable[Mapping[str, Any]]) -> Trace:
    """The steps of a trace, given as the list traceEvents."""
    by_category: dict[str, list[Event]] = defaultdict(list)
    for raw in events:
        if raw.get("ph") == "X" and "ts" in raw:
            event = Event(
                str(raw.get("name", "")),
                str(raw.get("cat", "")).lower(),
                float(raw["ts"]),
                float(raw.get("dur", 0)),
                raw.get("tid"),
                raw.get("args") or {},
            )
            by_category[event.category].append(event)
    annotations = by_category["user_annotation"]
    steps = _steps(annotations)
    if not steps:
        return Trace([])
    calls = sorted((e for name in _CALLS for e in by_category[name]), key=lambda e: (e.start, -e.duration))
    thread = _launching_thread(annotations, steps, calls)
    step_of_call = _assign_calls(steps, calls, thread)
    device = [event for name in _DEVICE for event in by_category[name]]
    _assign_device(steps, device, step_of_call)
    _assign_parts(steps, annotations)
    return Trace(steps, _compute_stream(device))


def _steps(annotations: list[Event]) -> list[Step]:
    found = []
    for event in annotations:
        if match := _STEP.fullmatch(event.name):
            found.append(Step(int(match[1]), match[2], event.start, event.end))
    return sorted(found, key=lambda step: step.start)


def _step_at(steps: list[Step], starts: list[float], time: float) -> Step | None:
    index = bisect.bisect_right(starts, time) - 1
    return steps[index] if index >= 0 and time <= steps[index].end else None


def _launching_thread(annotations: list[Event], steps: list[Step], calls: list[Event]) -> object:
    """The annotations' thread; where calls name threads in another way, the one that launches in steps."""
    thread = next(event.thread for event in annotations if _STEP.fullmatch(event.name))
    if any(call.thread == thread for call in calls):
        return thread
    starts = [step.start for step in steps]
    counts = Counter(
        call.thread for call in calls if "Launch" in call.name and _step_at(steps, starts, call.start)
    )
    return counts.most_common(1)[0][0] if counts else thread


def _assign_calls(steps: list[Step], calls: list[Event], thread: object) -> dict[object, Step]:
    """Give each step its calls; returns the step of each correlation id."""
    starts = [step.start for step in steps]
    step_of: dict[object, Step] = {}
    outer_end = float("-inf")
    for call in calls:
        step = _step_at(steps, starts, call.start) if call.thread == thread else None
        if step is None:
            continue
        if (correlation := call.arguments.get("correlation")) is not None:
            step_of[correlation] = step
        if call.start >= outer_end:  # a driver call inside a runtime call is the same call
            step.calls.append(call)
            outer_end = call.end
    return step_of


def _assign_device(steps: list[Step], device: list[Event], step_of: Mapping[object, Step]) -> None:
    for event in device:
        if (step := step_of.get(event.arguments.get("correlation"))) is not None:
            step.device.append(event)
    for step in steps:
        step.device.sort(key=lambda event: event.start)


def _assign_parts(steps: list[Step], annotations: list[Event]) -> None:
    """Time of the outermost annotations inside each step, by name."""
    starts = [step.start for step in steps]
    outer_end = float("-inf")
    for event in sorted(annotations, key=lambda e: (e.start, -e.duration)):
        if _STEP.fullmatch(event.name) or event.start < outer_end:
            continue
        if (step := _step_at(steps, starts, event.start)) is not None:
            step.parts[event.name] = step.parts.get(event.name, 0.0) + event.duration
            outer_end = event.end


def _compute_stream(device: list[Event]) -> object:
    time: Counter[object] = Counter()
    for event in device:
        if event.category == "kernel":
            time[event.arguments.get("stream")] += int(event.duration * 1000)
    return time.most_common(1)[0][0] if time else None


def _gap(number: int, work: list[Interval], next_start: float) -> Gap:
    start = work[0][0]
    end = max(stop for _, stop in work)
    busy = covered([(a, min(b, next_start)) for a, b in work if a < next_start])
    return Gap(number, next_start - start, busy, max(0.0, next_start - end))


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union of intervals: kernels that overlap (dependent launch) count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
