"""Throughput and latency over batch size, from the JSON of `run.py`.

    python -m benchmarks.gpu.run --shapes A,B --workloads W2,W3,W5,sweep
    python -m benchmarks.gpu.plot RESULTS.json [MORE.json …] --out FIGURE.svg

Draws for each shape the sweep and W3 (requests at once: output tokens a second, ms per decode step), W2 (one
request: ms per token) and W5 (concurrency: output tokens a second, median inter-token latency). Needs matplotlib:
`pip install 'tercet[plot]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import peers, results
from benchmarks.gpu.results import Measurement

LATENCY = {"sweep": peers.STEP, "W3": peers.STEP, "W2": peers.TOKEN, "W5": peers.ITL50}
LABELS = {"sweep": "LLM", "W3": "LLM", "W2": "LLM", "W5": "AsyncLLM"}
Points = dict[int, float]
Lines = dict[str, Points]


def lines(measurements: Sequence[Measurement]) -> tuple[Lines, Lines]:
    """Label -> batch size -> output tokens a second, and the same with a latency in ms.

    Where two workloads have the same batch size, the later one counts.
    """
    throughput: Lines = defaultdict(dict)
    latency: Lines = defaultdict(dict)
    for measurement in measurements:
        metric = LATENCY.get(measurement.workload)
        if metric is None or measurement.batch is None or measurement.variant:
            continue
        label = f"{measurement.shape} {LABELS[measurement.workload]}"
        if (rate := measurement.median(peers.OUTPUT)) is not None:
            throughput[label][measurement.batch] = rate
        if (ms := measurement.median(metric)) is not None:
            latency[label][measurement.batch] = ms
    return dict(throughput), dict(latency)


def draw(throughput: Lines, latency: Lines, path: Path) -> None:
    """Two panels, both axes logarithmic; the file's suffix names its format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _panel(left, throughput, "output tokens a second")
    _panel(right, latency, "ms per token of a request")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, drawn: Lines, label: str) -> None:
    for name, points in sorted(drawn.items()):
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel=label)
    axes.grid(visible=True, which="both", alpha=0.3)
    if drawn:
        axes.legend(fontsize="small")


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a figure; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULTS.json")
    parser.add_argument("--out", type=Path, help="default: the first file's name with .svg")
    args = parser.parse_args(argv)
    path: Path = args.out or args.files[0].with_suffix(".svg")
    found = [measurement for file in args.files for measurement in results.load(file)]
    throughput, latency = lines(found)
    if not throughput and not latency:
        print("nothing to draw: no W2, W3, W5 or sweep in these files", file=sys.stderr)
        return 1
    try:
        draw(throughput, latency, path)
    except ImportError:
        print("matplotlib is not installed: pip install 'tercet[plot]'", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
