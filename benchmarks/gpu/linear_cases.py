"""The linear layers that are tuned: their shapes, inputs, exact results, and the kernels worth trying for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from tercet import ops
from tercet.ops import PrecedingNorm, triton_linear
from tercet.ops.linear_configs import Kind, LinearConfig
from tercet.ops.triton_support import next_power_of_2

DEVICE = "cuda"
DTYPE = torch.bfloat16
EPS = 1e-6
ROWS = (1, 2, 4, 8, 16, 32, 64)
NORM_ROWS = (1, 2, 4)
GEMV_ROWS = 4  # up to here it may win
SHARED_MEMORY = 220_000  # bytes that a program may take on Hopper, with some to spare


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model, perhaps with what is fused to it.

    Attributes:
        out_size: rows of the weight; twice the outputs where `kind` is gated.
    """

    model: str
    name: str
    kind: Kind
    out_size: int
    in_size: int

    @property
    def key(self) -> tuple[str, int, int]:
        """In the table."""
        return self.kind, self.out_size, self.in_size

    @property
    def is_gated(self) -> bool:
        return "gated" in self.kind

    @property
    def is_normed(self) -> bool:
        return "norm" in self.kind

    @property
    def weight_bytes(self) -> int:
        return 2 * self.out_size * self.in_size

    @property
    def activation(self) -> ops.Activation | None:
        return "silu" if self.is_gated else None

    @property
    def row_counts(self) -> tuple[int, ...]:
        return NORM_ROWS if self.is_normed else ROWS


def layers(shape: Shape) -> list[Layer]:
    """Those of one model; kinds with a norm come last, since what they compete with is tuned before."""
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    name, hidden = shape.name, shape.hidden
    return [
        Layer(name, "qkv", "linear", heads + 2 * kv_heads, hidden),
        Layer(name, "o", "linear", hidden, heads),
        Layer(name, "gate_up", "gated", 2 * shape.intermediate, hidden),
        Layer(name, "down", "linear", hidden, shape.intermediate),
        Layer(name, "head", "linear", shape.vocab, hidden),
        Layer(name, "norm+qkv", "norm_linear", heads + 2 * kv_heads, hidden),
        Layer(name, "norm+gate_up", "norm_gated", 2 * shape.intermediate, hidden),
    ]


# --------------------------------------------------------------------------------------------- candidates


def candidates(layer: Layer, rows: int) -> list[LinearConfig]:
    """Kernels to try for a number of rows."""
    gemv = gemv_candidates(layer, rows) if rows <= GEMV_ROWS else []
    return gemv if layer.is_normed else gemv + product_candidates(layer, rows)


def gemv_candidates(layer: Layer, rows: int) -> list[LinearConfig]:
    """A program's piece of the weight is 4 to 32 KB, less where several rows share the registers."""
    padded = next_power_of_2(layer.in_size)
    widths = [padded] if layer.is_normed else sorted({min(padded, width) for width in (1024, 4096)})
    least, most = (2048, 16384) if rows == 1 else (4096, 8192)
    made = []
    for width in widths:
        for block_o in (1, 2, 4, 8, 16):
            elements = width * block_o * (2 if layer.is_gated else 1)
            if least <= elements <= most:
                warps = max(2, min(8, elements // 1024))
                made.append(LinearConfig("gemv", block_o=block_o, block_k=width, warps=warps))
    return made


def product_candidates(layer: Layer, rows: int) -> list[LinearConfig]:
    """Kernels with tensor cores whose tiles fit into shared memory."""
    m = min(64, max(16, next_power_of_2(rows)))
    texts = [
        f"grouped m{m} o8 k128 g4 s3 w4",
        f"grouped m{m} o8 k64 g8 s3 w8",
        f"grouped m{m} o16 k64 g4 s4 w4",
        f"grouped m{m} o16 k128 g4 s2 w4",
        f"grouped m{m} o16 k128 g4 s3 w4",
        f"grouped m{m} o16 k64 g8 s3 w8",
        f"grouped m{m} o32 k64 g4 s3 w8",
        f"tiled m{m} o32 k128 s4 w4",
        f"tiled m{m} o64 k64 s5 w4",
        f"tiled m{m} o64 k128 s4 w4",
        f"tiled m{m} o128 k64 s4 w4",
    ]
    if m == 64:
        texts += ["tiled m64 o16 k128 s5 w4", "tiled m64 o32 k64 s6 w4"]
    return [config for config in map(LinearConfig.parse, texts) if _fits(layer, config)]


def _fits(layer: Layer, config: LinearConfig) -> bool:
    width = config.block_k * config.groups
    lines = config.block_m + config.block_o * (2 if layer.is_gated else 1)
    is_sensible = width <= next_power_of_2(layer.in_size) and config.block_o <= layer.out_size
    return is_sensible and 2 * config.stages * width * lines <= SHARED_MEMORY


# ------------------------------------------------------------------------------------------------- inputs


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


@dataclass(frozen=True)
class Inputs:
    """One set for a layer and a number of rows."""

    layer: Layer
    x: Tensor
    norm: PrecedingNorm | None
    weight: Tensor

    @classmethod
    def make(cls, layer: Layer, rows: int, weight: Tensor) -> Inputs:
        x = random(rows, layer.in_size)
        norm = None
        if layer.is_normed:
            norm = PrecedingNorm(random(rows, layer.in_size), random(layer.in_size), EPS)
        return cls(layer, x, norm, weight)

    def call(self, config: LinearConfig | None) -> Callable[[], Any]:
        """What runs a kernel, or with None the operations one by one as they are registered."""
        activation = self.layer.activation
        if config is not None:
            if self.norm is not None:
                function: Any = triton_linear.add_rms_norm_linear
                arguments: tuple[Any, ...] = (config, self.x, self.norm, self.weight)
            else:
                function, arguments = triton_linear.linear, (config, self.x, self.weight)
            return functools.partial(function, *arguments, activation=activation)
        return self._separately

    def _separately(self) -> Tensor:
        x, weight = self.x, self.weight
        if self.norm is None:
            product = F.linear(x, weight)
            return ops.silu_and_mul(product) if self.layer.is_gated else product
        normed, _ = ops.add_rms_norm(x, *self.norm)
        return ops.gated_linear(normed, weight) if self.layer.is_gated else ops.linear(normed, weight)

    def exact(self) -> Tensor:
        """In float64, but for the rounding of the norm's result."""
        x = self.x
        if self.norm is not None:
            total = x + self.norm.residual
            normed = F.rms_norm(total.double(), (self.layer.in_size,), self.norm.weight_D.double(), EPS)
            x = normed.to(DTYPE)
        product = F.linear(x.double(), self.weight.double())
        if not self.layer.is_gated:
            return product
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up


def weights(layer: Layer, total_bytes: float) -> list[Tensor]:
    """As many weights as hold `total_bytes` together, at least two and at most 96."""
    count = max(2, min(96, math.ceil(total_bytes / layer.weight_bytes)))
    return [random(layer.out_size, layer.in_size).div_(layer.in_size**0.5) for _ in range(count)]


def relative_error(got: Tensor | tuple[Tensor, Tensor], exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact result; NaN where something was not written."""
    out = got[0] if isinstance(got, tuple) else got
    return float((out.double() - exact).norm() / exact.norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def fill(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.empty = fill  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty
