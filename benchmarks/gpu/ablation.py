"""What each technique is worth: W2 and W3 with one of them off at a time.

    python -m benchmarks.gpu.ablation --shapes A --time-limit 600

Every variant starts an engine of its own with other engine arguments or environment variables, as `variants` lists
them: a new technique with a switch takes part by one more line there. Kernels take part by themselves: for each
operation of `tercet.ops` that has several implementations, each one that is not the default is forced in turn through
TERCET_OPS. A variant that cannot run is listed with its error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import options, peers
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.environment import headline
from benchmarks.gpu.results import Measurement, Results, number
from benchmarks.gpu.suite import Suite, settings_of, sizes_of
from tercet import ops

BASELINE = "all on"
WORKLOADS = ("W2", "W3")
METRICS = (peers.TOKEN, peers.TTFT, peers.STEP, peers.OUTPUT)


@dataclass(frozen=True)
class Variant:
    """An engine with something off.

    Attributes:
        extra: engine arguments.
        env: environment variables.
    """

    name: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


def variants() -> list[Variant]:
    """The baseline first, then what there is to switch off."""
    return [
        Variant(BASELINE),
        Variant("no CUDA graphs", {"enforce_eager": True}),
        Variant("no overlap", {"async_scheduling": False}),
        *kernel_variants(ops.operations()),
        Variant("reference kernels", env={"TERCET_OPS": "reference"}),
    ]


def kernel_variants(operations: Mapping[str, tuple[str, ...]]) -> list[Variant]:
    """One for each implementation that is not its operation's default.

    Args:
        operations: name -> implementations, most preferred first.
    """
    return [
        Variant(f"{name}={implementation}", env={"TERCET_OPS": f"{name}={implementation}"})
        for name, implementations in operations.items()
        for implementation in implementations[1:]
    ]


def table(results: Results, shape: str) -> str:
    """A line for each variant: its figures, and how many times slower than the baseline it is, as Markdown."""
    mine = [m for m in results.measurements if m.shape == shape]
    columns = [
        (m.workload, m.case, metric)
        for m in mine
        if m.variant == BASELINE and m.workload in WORKLOADS
        for metric in METRICS
        if m.median(metric) is not None
    ]
    titles = [f"{workload} {case} {metric}".replace("  ", " ") for workload, case, metric in columns]
    lines = [f"| {shape} | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(columns)]
    for variant in dict.fromkeys(m.variant for m in mine):
        own = [m for m in mine if m.variant == variant]
        error = next((m.error for m in own if m.error), "")
        cells = [_cell(mine, own, variant, column) for column in columns]
        lines.append(f"| {variant} | " + " | ".join(cells) + f" |{f' {error}' if error else ''}")
    return "\n".join(lines)


def _cell(
    all_on: Sequence[Measurement], own: Sequence[Measurement], variant: str, column: tuple[str, str, str]
) -> str:
    value = _median_of(own, variant, column)
    baseline = _median_of(all_on, BASELINE, column)
    if value is None:
        return ""
    if variant == BASELINE or not baseline:
        return number(value)
    slower = baseline / value if peers.more_is_better(column[2]) else value / baseline
    return f"{number(value)} (×{slower:.2f})"


def _median_of(
    measurements: Sequence[Measurement], variant: str, column: tuple[str, str, str]
) -> float | None:
    workload, case, metric = column
    for one in measurements:
        if (one.variant, one.workload, one.case) == (variant, workload, case):
            return one.median(metric)
    return None


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the program; returns what it measured."""
    parser = options.parser(__doc__, "A")
    known = {variant.name: variant for variant in variants()}
    parser.add_argument(
        "--variants",
        type=options.names(known),
        default=list(known),
        metavar="NAMES",
        help=f"comma-separated; the baseline always runs. There are: {', '.join(known)}",
    )
    args = parser.parse_args(argv)
    clock, sizes = Clock(args.time_limit), sizes_of(args.scale)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as folder:
        plan = options.plan(args, Path(folder))
        results = options.results(
            args, "ablation", settings_of(plan, sizes, time_limit_s=args.time_limit, variants=args.variants)
        )
        suite = Suite(plan, results, clock, sizes)
        for shape in args.shapes:
            for name in dict.fromkeys([BASELINE, *args.variants]):
                variant = known[name]
                suite.offline(shape, WORKLOADS, variant=name, extra=variant.extra, env=variant.env)
    print(headline(results.environment))
    for shape in args.shapes:
        print(f"\n{table(results, shape)}")
    for line in results.not_run:
        print(f"not run: {line}")
    print(f"every run in {results.path}")
    return results


if __name__ == "__main__":
    main()
