"""The workloads W1–W5 for models of several shapes, beside vLLM's figures and our goals.

    python -m benchmarks.gpu.run --shapes A,B,S --time-limit 1200

Weights are random; `workloads.py` says what each workload is, `peers.py` whose figures stand beside ours. Each shape
starts two engines: an `LLM` (16384 tokens, 1024 sequences a step) for W1–W4 and the sweep, an `AsyncLLM`
(8192, 1024) for W5. Every run is kept in a JSON file that is written anew after each; `plot.py` draws it. What the
time limit leaves out is named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import options, workloads
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.results import Results, table
from benchmarks.gpu.suite import Suite, settings_of, sizes_of

WORKLOADS = (*workloads.OFFLINE, *workloads.SERVING)
DEFAULT = "W1,W2,W3,W4,W5"


def main(argv: Sequence[str] | None = None) -> Results:
    """Run the program; returns what it measured."""
    parser = options.parser(__doc__, "A,B,S")
    parser.add_argument(
        "--workloads", type=options.names(WORKLOADS), default=DEFAULT, help=f"default {DEFAULT}"
    )
    parser.add_argument("--event-loop", choices=("auto", "asyncio", "uvloop"), default="auto", help="of W5")
    args = parser.parse_args(argv)
    clock, sizes = Clock(args.time_limit), sizes_of(args.scale)
    with tempfile.TemporaryDirectory(prefix="tercet-bench-") as folder:
        plan = options.plan(args, Path(folder))
        settings = settings_of(plan, sizes, event_loop=args.event_loop, time_limit_s=args.time_limit)
        results = options.results(args, "run", settings)
        suite = Suite(plan, results, clock, sizes, args.event_loop)
        offline = [name for name in args.workloads if name in workloads.OFFLINE]
        for shape in args.shapes:
            if offline:
                suite.offline(shape, offline)
            if "W5" in args.workloads:
                suite.serving(shape)
    print(table(results))
    print(f"every run in {results.path}")
    return results


if __name__ == "__main__":
    main()
