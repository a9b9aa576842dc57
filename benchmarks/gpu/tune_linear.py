"""Measures which kernel serves each linear layer of few rows best, and writes `ops/linear_table.py` anew.

    PYTHONPATH=. python benchmarks/gpu/tune_linear.py --out DIR [--models ABS] [--minutes 5] [--no-pdl]

Every kernel that is timed has first given, on fresh random inputs and into poisoned memory, what float64 gives.
Times are medians over replays of a CUDA graph whose calls go through weights that are together larger than the L2
cache. A kernel enters the table where it beats cuBLAS and separate operations by MARGIN. Then: a decode step's
linear layers as one graph, batch-invariant products bit for bit and their speed. Writes linear_table.py and
tune_linear.json to DIR as it goes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/tercet-tune-linear")

import torch
import torch.nn.functional as F

from benchmarks.gpu import linear_chain
from benchmarks.gpu.environment import describe
from benchmarks.gpu.linear_cases import (
    DTYPE,
    Inputs,
    Layer,
    candidates,
    layers,
    poisoned,
    random,
    relative_error,
    weights,
)
from benchmarks.gpu.linear_compile import Job, compile_all
from benchmarks.gpu.linear_timing import calls_us
from benchmarks.gpu.shapes import SHAPES, Shape
from tercet.ops import invariance, linear
from tercet.ops.linear_configs import SEPARATE, LinearConfig, invariant_config

SET_BYTES = 110e6  # weights that a graph goes through: twice the L2 cache
MIN_CALLS = 12  # of a graph
MARGIN = 1.02
LEFT_FOR_CHAINS_S = 60.0
INVARIANT_ROWS = (1, 64, 256, 1024, 4096)
MAX_ERROR = 5e-3  # bfloat16 rounds to 2**-9
CHAIN_ROWS = (1, 4, 16, 32, 64)
TABLE_HEAD = '''"""Measured choices for linear layers of few rows; written by `benchmarks/gpu/tune_linear.py`.

(kind, rows of the weight, D) -> {most rows of x: kernel}. 'separate' is cuBLAS with the operations around it one
by one, which also serves every shape and number of rows that is not here.
"""

TABLE: dict[tuple[str, int, int], dict[int, str]] = {'''


class Tuner:
    """Times kernels, layer after layer.

    Attributes:
        table: the choices so far.
        rows: all that was measured, one entry for each layer and number of rows.
        rejected: kernels that failed or were wrong, and why.
    """

    def __init__(self, *, programmatic: bool, deadline: float) -> None:
        self.programmatic, self.deadline = programmatic, deadline
        self.table: linear_chain.Table = {}
        self.rows: list[dict[str, Any]] = []
        self.rejected: dict[str, str] = {}

    def tune(self, layer: Layer) -> None:
        """Fill the table for one layer, as far as time allows."""
        with linear_chain.using(self.table, self.programmatic):
            sets = weights(layer, SET_BYTES)
            chosen: dict[int, str] = {}
            for rows in layer.row_counts:
                if time.monotonic() > self.deadline:
                    break
                times = self._time(layer, rows, sets)
                chosen[rows] = self._choose(layer, rows, times, sets)
        if chosen:
            self.table[layer.key] = chosen

    def _time(self, layer: Layer, rows: int, sets: list[torch.Tensor]) -> dict[str, float]:
        """Microseconds of the kernels that are right."""
        inputs = [Inputs.make(layer, rows, weight) for weight in sets]
        exact = inputs[0].exact()
        times: dict[str, float] = {}
        for config in candidates(layer, rows):
            name = f"{layer.model} {layer.name} {config}"
            if name in self.rejected:
                continue
            try:
                with poisoned():
                    error = relative_error(inputs[0].call(config)(), exact)
                if not error < MAX_ERROR:
                    raise ArithmeticError(f"relative error {error}")
                times[str(config)] = calls_us(self._calls(inputs, config))
            except Exception as error:  # a variant that fails is out, the others go on
                self.rejected[f"{layer.model} {layer.name} {rows} {config}"] = (
                    f"{type(error).__name__}: {error}"
                )
                if isinstance(error, torch.AcceleratorError):
                    raise
        return times

    def _choose(self, layer: Layer, rows: int, times: dict[str, float], sets: list[torch.Tensor]) -> str:
        inputs = [Inputs.make(layer, rows, weight) for weight in sets]
        separate = calls_us(self._calls(inputs, None))
        text, least = min(times.items(), key=lambda item: item[1], default=(SEPARATE, math.inf))
        if least * MARGIN > separate:
            text = SEPARATE
        self.rows.append(
            {
                "model": layer.model,
                "layer": layer.name,
                "rows": rows,
                "separate us": round(separate, 2),
                "best us": round(min(least, separate), 2),
                "TB/s": round(layer.weight_bytes / min(least, separate) / 1e6, 2),
                "kernel": text,
                "tried": {name: round(us, 2) for name, us in sorted(times.items(), key=lambda item: item[1])},
            }
        )
        return text

    @staticmethod
    def _calls(inputs: list[Inputs], config: LinearConfig | None) -> list[Any]:
        rounds = math.ceil(MIN_CALLS / len(inputs))
        return [item.call(config) for item in inputs] * rounds


def jobs(shape: Shape, programmatic: bool) -> list[Job]:
    """What tuning a model and its batch-invariant products will launch."""
    made = []
    for layer in layers(shape):
        for rows in layer.row_counts:
            made += [Job(layer, rows, str(config), programmatic) for config in candidates(layer, rows)]
    for layer in invariant_layers(shape):
        for rows in INVARIANT_ROWS:
            made.append(Job(layer, rows, str(invariant_config(rows, DTYPE)), programmatic))
    return made


def invariant_layers(shape: Shape) -> list[Layer]:
    """All but the head, and without fusion, which batch-invariant mode has none of."""
    return [replace(layer, kind="linear") for layer in layers(shape)[:4]]


def invariant_products(shape: Shape) -> list[dict[str, Any]]:
    """Whether rows keep their bits in any batch, and speed against cuBLAS."""
    measured = []
    for layer in invariant_layers(shape):
        sets, x = weights(layer, SET_BYTES), random(INVARIANT_ROWS[-1], layer.in_size)
        invariance.set_batch_invariant(True)
        whole = linear(x, sets[0])
        is_equal = all(
            torch.equal(linear(x[start : start + rows], sets[0]), whole[start : start + rows])
            for rows, start in (
                (1, 0),
                (1, 4095),
                (16, 5),
                (64, 100),
                (65, 99),
                (256, 7),
                (257, 300),
                (1000, 9),
            )
        )
        row: dict[str, Any] = {"model": shape.name, "layer": layer.name, "same bits": is_equal}
        exact = F.linear(x[:256].double(), sets[0].double())
        row["error"] = round(relative_error(whole[:256], exact), 5)
        for rows in INVARIANT_ROWS:
            part = x[:rows]
            invariance.set_batch_invariant(True)
            ours = calls_us([partial(linear, part, weight) for weight in sets])
            invariance.set_batch_invariant(False)
            cublas = calls_us([partial(F.linear, part, weight) for weight in sets])
            row[f"{rows} rows"] = f"{ours:.1f} us, {cublas / ours:.2f} of cuBLAS's speed"
        measured.append(row)
        print(row, flush=True)
    return measured


def table_text(table: linear_chain.Table) -> str:
    """The module `ops/linear_table.py`."""
    lines = [TABLE_HEAD]
    for (kind, out_size, in_size), by_rows in table.items():
        if all(text == SEPARATE for text in by_rows.values()):
            continue
        lines.append(f'    ("{kind}", {out_size}, {in_size}): {{')
        lines += [f'        {rows}: "{text}",' for rows, text in by_rows.items()]
        lines.append("    },")
    return "\n".join([*lines, "}"]) + "\n" if len(lines) > 1 else TABLE_HEAD + "}\n"


def short_table(rows: list[dict[str, Any]]) -> str:
    """One line for a layer: for each number of rows, separate µs > best µs and the kernel's kind."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        kernel = row["kernel"].split()[0]
        cell = f"{row['rows']}: {row['separate us']}>{row['best us']} {kernel}"
        lines.setdefault((row["model"], row["layer"]), []).append(cell)
    return "\n".join(f"{model} {layer:13}| " + " | ".join(cells) for (model, layer), cells in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="ABS")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--no-pdl", action="store_true", help="tune without programmatic launches")
    parser.add_argument("--commit", help="where git cannot tell it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    shapes = [SHAPES[name] for name in args.models]
    out: dict[str, Any] = {"environment": describe(args.commit), "chain": [], "invariant": []}
    tuner = Tuner(programmatic=not args.no_pdl, deadline=deadline - LEFT_FOR_CHAINS_S)

    def save() -> None:
        out["layers"], out["rejected"] = tuner.rows, tuner.rejected
        out["seconds"] = round(time.monotonic() - started, 1)
        (args.out / "linear_table.py").write_text(table_text(tuner.table))
        (args.out / "tune_linear.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")

    def seconds() -> str:
        return f"{time.monotonic() - started:.0f} s"

    def compile_jobs(made: list[Job]) -> None:
        failures = compile_all(made, deadline)
        for job, error in failures.items():
            tuner.rejected[f"{job.layer.model} {job.layer.name} {job.config}"] = error
        print(f"{len(made)} kernels compiled, {len(failures)} failed, after {seconds()}", flush=True)

    programmatic = not args.no_pdl
    compile_jobs([job for shape in shapes for job in jobs(shape, programmatic)])
    for shape in shapes:
        for layer in layers(shape):
            tuner.tune(layer)
        print(f"{shape.name}: tuned after {seconds()}", flush=True)
        save()
    chain_jobs = [linear_chain.jobs(shape, tuner.table, CHAIN_ROWS) for shape in shapes]
    compile_jobs([job for made in chain_jobs for job in made])
    for shape in shapes:
        out["chain"] += linear_chain.measure(shape, tuner.table, CHAIN_ROWS)
        save()
    for shape in shapes:
        out["invariant"] += invariant_products(shape)
        save()
    print(f"{len(tuner.rejected)} rejected:", *list(tuner.rejected.items())[:6], sep="\n  ")
    print(short_table(tuner.rows))
    for row in out["chain"]:
        print(" | ".join(f"{key} {value}" for key, value in row.items() if "differs" not in key))


if __name__ == "__main__":
    main()
