"""Figures of a sweep: latency over request rate, and throughput against each user's speed (the Pareto view).

Needs matplotlib, an optional dependency.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tercet.errors import ConfigError, TercetError


def check_matplotlib() -> None:
    """Raises ConfigError where there is no matplotlib; called before a long run, not after."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        raise ConfigError("plot", "needs matplotlib: pip install 'tercet[plot]'") from None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both coordinates (more is better), by ascending first coordinate."""
    front: list[tuple[float, float]] = []
    best = float("-inf")
    for point in sorted(set(points), reverse=True):
        if point[1] > best:
            best = point[1]
            front.append(point)
    return front[::-1]


def plot_sweep(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the runs of a sweep into an image file (PNG, SVG or PDF by its suffix).

    Args:
        results: with the metrics ttft, tpot and e2el.

    Raises:
        TercetError: it cannot be written.
    """
    # Without pyplot: no display, no global state.
    from matplotlib.figure import Figure  # type: ignore[import-not-found,unused-ignore]

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    latency, pareto = figure.subplots(1, 2)
    _draw_latency(latency, results)
    _draw_pareto(pareto, results)
    figure.suptitle(f"{results[0]['model_id']}: {results[0]['num_prompts']} requests a run")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise TercetError(f"cannot write {path}: {error}") from None


def _draw_latency(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    """Over the rate that was served, which an infinite rate has too."""
    runs = sorted(results, key=lambda result: float(result["request_throughput"]))
    rates = [run["request_throughput"] for run in runs]
    for key, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2el", "E2EL")):
        medians = [run[f"median_{key}_ms"] for run in runs]
        (line,) = axes.plot(rates, medians, marker="o", label=f"{label} median")
        tail = max(
            (name for name in runs[0] if name.endswith(f"_{key}_ms") and name[0] == "p"), key=_percentile
        )
        axes.plot(
            rates,
            [run[tail] for run in runs],
            "--",
            color=line.get_color(),
            label=f"{label} P{_percentile(tail):g}",
        )
    axes.set_yscale("log")
    axes.set_xlabel("requests per second, served")
    axes.set_ylabel("latency (ms)")
    axes.set_title("Latency over rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _percentile(key: str) -> float:
    """`p99_ttft_ms` -> 99."""
    return float(key[1:].partition("_")[0])


def _draw_pareto(axes: Any, results: Sequence[Mapping[str, Any]]) -> None:
    points = [
        (1e3 / result["median_tpot_ms"], result["output_throughput"], _traffic(result))
        for result in results
        if result["median_tpot_ms"] > 0
    ]
    for speed, throughput, traffic in points:
        axes.plot(speed, throughput, "o", color="tab:blue")
        axes.annotate(
            traffic, (speed, throughput), xytext=(4, 4), textcoords="offset points", fontsize="small"
        )
    front = pareto_front([(speed, throughput) for speed, throughput, _ in points])
    axes.plot([x for x, _ in front], [y for _, y in front], color="tab:blue", alpha=0.5)
    axes.set_xlabel("each user's speed (tok/s, 1 / median TPOT)")
    axes.set_ylabel("output throughput (tok/s)")
    axes.set_title("Pareto front")
    axes.grid(alpha=0.3)


def _traffic(result: Mapping[str, Any]) -> str:
    concurrency = result["max_concurrency"]
    rate = f"{result['request_rate']}/s"
    return rate if concurrency is None else f"{rate}, ≤ {concurrency}"
