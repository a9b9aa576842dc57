"""From pytest-benchmark's JSON to a table against the budgets of ARCHITECTURE.md, with how each piece grows.

    python -m pytest -q -o python_files='bench_*.py' -o timeout=0 --benchmark-json=raw.json benchmarks
    python -m benchmarks.report host_2cpu_2026-11-24 raw.json [more.json …]

writes benchmarks/results/NAME.md and NAME.json (machine, versions and statistics, without the single samples), and
NAME.svg where matplotlib is installed (`pip install 'tercet[plot]'`).

A benchmark takes part by `benchmark.extra_info`: `piece`, and `n` for what its cost is a function of; or by
`us_per_token`. Others are listed as they are.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).parent / "results"
STATISTICS: Final = ("median", "iqr", "min", "max", "mean", "stddev", "rounds")


@dataclass(frozen=True)
class Budget:
    """What ARCHITECTURE.md allows a piece: microseconds at a size, and how it may grow."""

    limit_us: float
    at: object
    growth: str


BUDGETS: Final = {
    "core: apply result and plan": Budget(150, 256, "with changes, not with batch"),
    "codec: plan and result": Budget(40, 256, "flat"),
}
TOKEN_BUDGET: Final = Budget(3, "token", "linear, spread over frontends")


@dataclass(frozen=True)
class Row:
    """One measurement, in microseconds."""

    piece: str
    n: object
    median_us: float
    iqr_us: float
    min_us: float
    budget: Budget | None


def read(paths: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Machine and benchmarks of several files of pytest-benchmark; the machine is that of the first."""
    files = [json.loads(path.read_text()) for path in paths]
    machine = {k: v for k, v in files[0]["machine_info"].items() if k != "node"}
    return machine, [benchmark for file in files for benchmark in file["benchmarks"]]


def to_row(benchmark: dict[str, Any]) -> Row:
    stats, info = benchmark["stats"], benchmark["extra_info"]
    median, iqr, least = (stats[name] * 1e6 / info.get("per_round", 1) for name in ("median", "iqr", "min"))
    if "us_per_token" in info:
        share = info["us_per_token"] / median
        group = benchmark["fullname"].rpartition("/")[2].partition(".py")[0].removeprefix("bench_")
        name = benchmark["name"].removeprefix("test_")
        return Row(
            f"frontend, {group}: {name}", "token", median * share, iqr * share, least * share, TOKEN_BUDGET
        )
    piece, n = info.get("piece", benchmark["name"].removeprefix("test_")), info.get("n", "")
    budget = BUDGETS.get(piece)
    return Row(piece, n, median, iqr, least, budget if budget is not None and budget.at == n else None)


def render(name: str, machine: dict[str, Any], rows: list[Row]) -> str:
    cpu = machine.get("cpu", {}).get("brand_raw", "unknown")
    versions = ", ".join(f"{package} {version}" for package, version in machine.get("packages", {}).items())
    lines = [
        f"# Host benchmarks: {name}",
        "",
        f"{machine.get('usable_cpus', '?')} CPUs of {cpu}, {machine['system']} {machine['release']},"
        f" Python {machine['python_version']}, {versions}.",
        f"Load averages at the end: {machine.get('load_average')}; other work shared the machine, so medians are"
        " given with their interquartile range, and the least time.",
        "",
        "| piece | n | median µs | IQR | least | budget µs | within |",
        "|---|---:|---:|---:|---:|---:|---|",
        *map(_line, rows),
        "",
        "## Growth",
        "",
        "| piece | from | to | median grows by | budget says |",
        "|---|---:|---:|---:|---|",
        *_growth(rows),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    limit, verdict = "", ""
    if row.budget is not None:
        limit, verdict = (
            f"{row.budget.limit_us:g}",
            "yes" if row.median_us <= row.budget.limit_us else "**no**",
        )
    times = " | ".join(f"{time_us:.2f}" for time_us in (row.median_us, row.iqr_us, row.min_us))
    return f"| {row.piece} | {row.n} | {times} | {limit} | {verdict} |"


def _growth(rows: list[Row]) -> list[str]:
    lines = []
    for piece, group in _by_piece(rows).items():
        if len(group) > 1:
            first, last = group[0], group[-1]
            says = BUDGETS[piece].growth if piece in BUDGETS else ""
            lines.append(
                f"| {piece} | {first.n} | {last.n} | {last.median_us / first.median_us:.2f} × | {says} |"
            )
    return lines


def _by_piece(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.piece, []).append(row)
    return groups


def plot(rows: list[Row], path: Path) -> bool:
    """Median over n of every piece that has numbers for n. False without matplotlib."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for piece, group in _by_piece(rows).items():
        points = [(row.n, row.median_us) for row in group if isinstance(row.n, int)]
        if len(points) > 1:
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=piece)
            budget = BUDGETS.get(piece)
            if budget is not None:
                axes.plot(budget.at, budget.limit_us, marker="_", markersize=16, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="requests running", ylabel="median µs a step (bars: budgets)")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    return True


def main(name: str, *files: str) -> None:
    machine, benchmarks = read([Path(file) for file in files])
    rows = [to_row(benchmark) for benchmark in benchmarks]
    kept = [
        {
            "name": b["fullname"].rpartition("/")[2],
            "extra_info": b["extra_info"],
            "stats": {key: b["stats"][key] for key in STATISTICS},
        }
        for b in benchmarks
    ]
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine, "unit": "seconds", "benchmarks": kept}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    (RESULTS / f"{name}.md").write_text(render(name, machine, rows))
    plotted = plot(rows, RESULTS / f"{name}.svg")
    print(render(name, machine, rows))
    print("plotted" if plotted else "no plot: matplotlib is not installed")


if __name__ == "__main__":
    main(*sys.argv[1:])
