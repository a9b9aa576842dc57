"""Measurements as they come in: kept with every run, written after each, printed as one table."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu import peers
from benchmarks.gpu.environment import headline

Figures = dict[str, float]
"""Metric -> value of one run."""


@dataclass
class Measurement:
    """One case of a workload: figures of each run, those of the warm-up apart."""

    shape: str
    workload: str
    case: str  # batch size or concurrency where the workload has several
    what: str
    variant: str = ""  # of the engine, where several are compared
    batch: int | None = None  # requests at once, for plots
    warmup: list[Figures] = field(default_factory=list)
    runs: list[Figures] = field(default_factory=list)
    error: str = ""

    def values(self, metric: str) -> list[float]:
        """The metric in every run."""
        return [run[metric] for run in self.runs if metric in run]

    def median(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.median(values) if values else None


class Results:
    """All measurements of a program, in a file that is whole after every run."""

    def __init__(self, path: Path, environment: dict[str, Any], settings: dict[str, Any]) -> None:
        """
        Args:
            path: of the JSON file.
            settings: what the program was asked for.
        """
        self.path = path
        self.environment = environment
        self.settings = settings
        self.measurements: list[Measurement] = []
        self.engines: list[dict[str, Any]] = []  # arguments of each engine that was started
        self.not_run: list[str] = []

    def add(self, measurement: Measurement) -> Measurement:
        self.measurements.append(measurement)
        return measurement

    def skip(self, what: str, why: str) -> None:
        """Note that something did not run."""
        self.not_run.append(f"{what}: {why}")
        print(f"  not run: {what}: {why}", flush=True)
        self.save()

    def save(self) -> None:
        """Write everything; a reader never sees half a file."""
        data = {
            "environment": self.environment,
            "settings": self.settings,
            "engines": self.engines,
            "measurements": [asdict(measurement) for measurement in self.measurements],
            "not_run": self.not_run,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        text = json.dumps(data, indent=1, ensure_ascii=False, default=msgspec.to_builtins)
        partial.write_text(text + "\n")
        partial.replace(self.path)


def load(path: Path) -> list[Measurement]:
    """Measurements of a file that `Results` wrote."""
    return [Measurement(**entry) for entry in json.loads(path.read_text())["measurements"]]


def slug(text: str) -> str:
    """Part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def number(value: float) -> str:
    """Four digits or so: 18,123 or 1.924."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def table(results: Results) -> str:
    """Every metric of every measurement as Markdown, on an H100 beside vLLM's figure and the goal."""
    lines = [
        headline(results.environment),
        "",
        "| shape | workload | metric | runs | vLLM | goal | met |",
        "|---|---|---|---|---|---|---|",
    ]
    comparable = not results.settings.get("tiny") and "H100" in results.environment["gpu"]
    for measurement in results.measurements:
        lines += _lines(measurement, comparable)
    lines += [f"not run: {line}" for line in results.not_run]
    return "\n".join(lines)


def _lines(measurement: Measurement, comparable: bool) -> list[str]:
    parts = (measurement.workload, measurement.case, measurement.variant and f"({measurement.variant})")
    name = " ".join(filter(None, parts))
    lines = []
    if measurement.error:
        lines.append(f"| {measurement.shape} | {name} | error: {measurement.error} | | | | |")
    for metric in dict.fromkeys(metric for run in measurement.runs for metric in run):
        values = measurement.values(metric)
        peer = peers.find(measurement.workload, measurement.case, metric, measurement.shape)
        cells = [measurement.shape, name, metric, ", ".join(map(number, values))]
        if peer is not None and comparable:
            met = peers.is_met(metric, statistics.median(values), peer.goal)
            bound = "≥" if peers.more_is_better(metric) else "≤"
            cells += [peer.vllm, f"{bound} {peer.goal:,g}", "yes" if met else "**no**"]
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
