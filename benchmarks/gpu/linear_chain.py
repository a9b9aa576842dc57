"""All of a decode step's linear layers, norms and activations in one CUDA graph: with cuBLAS, with the table's
kernels, and with those launched programmatically.

Attention is left out but for the kernel before it (QK norm, rope, cache write), whose queries the output projection
takes; the head follows the last norm. So a time stands for a forward pass without reading a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.linear_cases import DEVICE, EPS, layers, random
from benchmarks.gpu.linear_compile import Job
from benchmarks.gpu.linear_timing import capture, replay_us
from benchmarks.gpu.shapes import Shape
from tercet import ops
from tercet.ops import PrecedingNorm, linear_configs
from tercet.ops.linear_configs import SEPARATE
from tercet.ops.triton_support import set_programmatic_launch

BLOCK_SIZE = 16
REPLAYS_CHECKED = 20
MODES = {"cuBLAS": (False, False), "ours": (True, False), "ours + PDL": (True, True)}  # table?, PDL?
Table = dict[tuple[str, int, int], dict[int, str]]


class Chain:
    """The weights of a model and one step over them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {
            "qkv": (heads + 2 * kv_heads, shape.hidden),
            "o": (shape.hidden, heads),
            "gate_up": (2 * shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        self.layers = [
            {name: random(*size).div_(size[1] ** 0.5) for name, size in sizes.items()}
            for _ in range(shape.layers)
        ]
        self.head = random(shape.vocab, shape.hidden)
        self.norm = random(shape.hidden)
        weights = [weight for layer in self.layers for weight in layer.values()]
        self.weight_bytes = 2 * sum(weight.numel() for weight in (*weights, self.head))

    def bind(self, rows: int) -> None:
        """Make the inputs of a step of so many rows."""
        shape = self.shape
        self.x, self.residual = random(rows, shape.hidden), random(rows, shape.hidden)
        self.angles = random(rows, shape.head_dim), random(rows, shape.head_dim)
        blocks = rows // BLOCK_SIZE + 2
        self.cache = random(2, blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        self.slots = torch.arange(rows, device=DEVICE) + BLOCK_SIZE

    def step(self) -> Tensor:
        """Logits; not those of a model, since nothing attends."""
        x, residual = self.x, self.residual
        for layer in self.layers:
            qkv, residual = ops.add_rms_norm_linear(x, self._after(residual), layer["qkv"])
            q = ops.rope_and_write_kv(
                qkv.unflatten(-1, (-1, self.shape.head_dim)), *self.angles, self.cache, self.slots
            )
            x = ops.linear(q.flatten(1), layer["o"])
            hidden, residual = ops.add_rms_norm_gated_linear(x, self._after(residual), layer["gate_up"])
            x = ops.linear(hidden, layer["down"])
        return ops.linear(ops.add_rms_norm(x, *self._after(residual))[0], self.head)

    def time_us(self, expected: Tensor) -> float:
        """Microseconds of a replayed step.

        Raises:
            ArithmeticError: a replay gives other bits than `expected`.
        """
        outputs: list[Tensor] = []
        graph = capture(lambda: outputs.append(self.step()))
        for _ in range(REPLAYS_CHECKED):
            outputs[-1].fill_(float("nan"))
            graph.replay()
            if not torch.equal(outputs[-1], expected):
                raise ArithmeticError("a replay gives other bits")
        return replay_us(graph)

    def _after(self, residual: Tensor) -> PrecedingNorm:
        return PrecedingNorm(residual, self.norm, EPS)


@contextmanager
def using(table: Table, programmatic: bool) -> Iterator[None]:
    """Choices from `table` instead of the shipped one."""
    shipped = linear_configs.TABLE
    linear_configs.TABLE = table
    linear_configs._measured.cache_clear()
    set_programmatic_launch(programmatic)
    try:
        yield
    finally:
        linear_configs.TABLE = shipped
        linear_configs._measured.cache_clear()
        set_programmatic_launch(True)


def jobs(shape: Shape, table: Table, row_counts: tuple[int, ...]) -> list[Job]:
    """Kernels of the modes without programmatic launches, which tuning has not compiled."""
    return [
        Job(layer, rows, table[layer.key][rows], False)
        for layer in layers(shape)
        for rows in row_counts
        if table.get(layer.key, {}).get(rows, SEPARATE) != SEPARATE
    ]


def measure(shape: Shape, table: Table, row_counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Microseconds of a step in each mode, and the difference of the logits from those with cuBLAS."""
    chain, measured = Chain(shape), []
    for rows in row_counts:
        chain.bind(rows)
        row: dict[str, Any] = {
            "model": shape.name,
            "rows": rows,
            "floor 3 TB/s": round(chain.weight_bytes / 3e6, 1),
        }
        reference: Tensor | None = None
        for mode, (with_table, programmatic) in MODES.items():
            with using(table if with_table else {}, programmatic):
                try:
                    expected = chain.step().clone()
                    reference = expected.float() if reference is None else reference
                    difference = (expected.float() - reference).norm() / reference.norm()
                    row[f"{mode} differs"] = round(float(difference), 5)
                    row[mode] = round(chain.time_us(expected), 1)
                except Exception as error:  # the other modes are still worth having
                    row[mode] = f"{type(error).__name__}: {error}"[:120]
        measured.append(row)
        print(row, flush=True)
    return measured
