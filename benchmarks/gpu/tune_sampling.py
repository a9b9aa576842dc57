"""Is `sample_rows` right on this GPU, what does it cost, and which tiles are best?

    PYTHONPATH=. python benchmarks/gpu/tune_sampling.py --out DIR [--skip-checks] [--candidates]

First the kernel cases run (`tests/ops/triton_sampling_cases.py`); times of wrong kernels say nothing. Then each
variant at several batch sizes and vocabularies: median time of a replayed CUDA graph, in which every call has
logits of its own, larger together than the L2 cache where that is the case in use. Logits are bfloat16 and normal:
'flat' as a model with random weights gives them, 'peaked' as trained ones do. Bytes are those of the logits, read
once. Beside it, as far as it exists for the case: `torch.argmax` of the same logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from tercet.ipc.messages import Sampling
from tercet.ops import triton_sampling
from tercet.ops.sample_rows import RowHistory, SamplingTables, Variant
from tercet.ops.triton_sampling import Tiles
from tercet.worker_proc.sampling_state import SamplingState

CASES = Path(__file__).parents[2] / "tests" / "ops" / "triton_sampling_cases.py"
SIZES = (1, 16, 64, 256, 1024)
VOCABS = (151936, 49152)
MAX_LEN = 2048
MAX_COPIES, COPY_BYTES = 4, 400e6  # of the logits in one graph

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_p": {"temperature": 1.0, "top_p": 0.9},
    "top_k": {"temperature": 0.6, "top_k": 20},
    "top_k+top_p": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "penalties": {"temperature": 0.6, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}
SCALES = {"flat": 0.7, "peaked": 3.0}
CANDIDATES = [
    Tiles(scan=scan, scan_warps=warps)
    for scan in (1024, 2048, 4096, 8192)
    for warps in (4, 8)
    if scan > 512 * warps / 4
] + [
    Tiles(restrict=tile, restrict_warps=warps)
    for tile, warps in ((1024, 16), (4096, 16), (1024, 8), (2048, 8))
]


class Bench:
    """One kind of request in every row."""

    def __init__(self, kind: str, vocab_size: int, lines: int, scale: float) -> None:
        self.lines, self.vocab_size = lines, vocab_size
        state = SamplingState(lines, vocab_size, MAX_LEN, torch.device("cuda"))
        stop = [3, 5]
        for row in range(lines):
            sampling = Sampling(max_tokens=MAX_LEN, stop_token_ids=stop, **REQUESTS[kind])
            state.admit(row, sampling, 1000 + row, 4, np.array([1, 2, 3, 4, 7], np.int32))
        self.tables: SamplingTables = state.tables()
        rows = np.arange(lines, dtype=np.int32)
        self.variant: Variant = state.variant(rows)
        self.row_S = torch.from_numpy(rows).cuda()
        self.out_3S = torch.zeros((3, lines), dtype=torch.int32, device="cuda")
        self.history = RowHistory(
            torch.zeros((lines, MAX_LEN + 1), dtype=torch.int32, device="cuda"),
            torch.full((lines,), 5, dtype=torch.int32, device="cuda"),
            torch.zeros(lines, dtype=torch.bool, device="cuda"),
        )
        copies = max(1, min(MAX_COPIES, int(COPY_BYTES / (2 * lines * vocab_size))))
        self.logits = [self._normal(scale) for _ in range(copies)]

    def _normal(self, scale: float) -> Tensor:
        made = torch.empty((self.lines, self.vocab_size), device="cuda", dtype=torch.bfloat16)
        return made.normal_(0, scale)

    def run(self, logits: Tensor) -> None:
        triton_sampling.sample_rows(
            logits,
            self.row_S,
            self.tables,
            self.history,
            self.out_3S,
            variant=self.variant,
            max_model_len=MAX_LEN,
        )

    def reset(self) -> None:
        """A row that finished is skipped: begin again with live rows, in the graph too."""
        self.history.lengths_R.fill_(5)
        self.history.finished_R.fill_(False)

    def time_us(self) -> float:
        """Of one call, less the two fills that keep the rows alive."""

        def calls(*, sample: bool) -> None:
            for logits in self.logits:
                self.reset()
                if sample:
                    self.run(logits)

        both = _graph_us(lambda: calls(sample=True))
        fills = _graph_us(lambda: calls(sample=False))
        return (both - fills) / len(self.logits)

    def argmax_us(self) -> float:
        return _graph_us(lambda: [logits.argmax(dim=-1) for logits in self.logits]) / len(self.logits)


def _graph_us(launch: Any) -> float:
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    median: float = triton.testing.do_bench(graph.replay, warmup=5, rep=25, return_mode="median")
    return median * 1e3


def check() -> None:
    """Run the kernel cases; leave if one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print("\n".join(done.stdout.splitlines()[-40:]), flush=True)
    if done.returncode:
        sys.exit("the kernels are wrong here: nothing was timed")


def measure() -> list[dict[str, Any]]:
    rows = []
    for vocab_size in VOCABS:
        for kind in REQUESTS:
            for shape, scale in SCALES.items():
                if shape == "peaked" and kind in ("greedy", "temperature", "penalties"):
                    continue  # their work does not depend on the values
                row: dict[str, Any] = {"V": vocab_size, "kind": f"{kind} {shape}"}
                for lines in SIZES:
                    bench = Bench(kind, vocab_size, lines, scale)
                    row[str(lines)] = round(bench.time_us(), 1)
                    if lines == 256:
                        row["TB/s at 256"] = round(2 * lines * vocab_size / row["256"] / 1e6, 2)
                        row["argmax at 256"] = round(bench.argmax_us(), 1) if kind == "greedy" else ""
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def tune() -> list[dict[str, Any]]:
    """Each candidate on the kinds that it concerns, at V = 151936."""
    rows = []
    default = triton_sampling.TILES
    for tiles in CANDIDATES:
        changed = {k: v for k, v in dataclasses.asdict(tiles).items() if v != getattr(default, k)}
        kinds = ("top_p", "top_k+top_p") if "restrict" in str(changed) else ("greedy", "temperature", "top_p")
        triton_sampling.TILES = tiles
        for kind in kinds:
            times = {
                str(n): round(Bench(kind, VOCABS[0], n, SCALES["flat"]).time_us(), 1) for n in (1, 64, 256)
            }
            rows.append({"tiles": dataclasses.asdict(tiles), "kind": kind, **times})
            print(json.dumps({"changed": changed, "kind": kind, **times}), flush=True)
    triton_sampling.TILES = default
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = ["V", "kind", *map(str, SIZES), "TB/s at 256", "argmax at 256"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--skip-checks", action="store_true", help="only time")
    parser.add_argument(
        "--candidates", action="store_true", help="time other tiles, instead of the usual ones"
    )
    args = parser.parse_args()
    if not args.skip_checks:
        check()
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "tiles": dataclasses.asdict(triton_sampling.TILES),
        "unit": "microseconds of a call, by number of lines",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = "candidates" if args.candidates else "times"
    out[name] = tune() if args.candidates else measure()
    path = args.out / f"tune_sampling_{name}.json"
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    if not args.candidates:
        print(table(out[name]))


if __name__ == "__main__":
    main()
