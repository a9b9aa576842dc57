"""Which kernel multiplies a few rows by a weight: looked up in the measured table, without importing Triton.

`linear_table.py` holds what `benchmarks/gpu/tune_linear.py` measured; nothing is tuned when a process starts.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tercet.ops.invariance import is_batch_invariant
from tercet.ops.linear_table import TABLE

Kind = Literal["linear", "gated", "norm_linear", "norm_gated"]
SEPARATE = "separate"  # in the table: cuBLAS, and the operations around it one by one

_KERNELS = {"gemv": "okw", "grouped": "mokgsw", "tiled": "moksw"}  # and the fields that each heeds
_FIELDS = {"m": "block_m", "o": "block_o", "k": "block_k", "g": "groups", "s": "stages", "w": "warps"}
_MIN_OUT_SIZE = 16
MAX_GEMV_ROWS = 8


@dataclass(frozen=True)
class LinearConfig:
    """A kernel of `kernels_linear` and how it is cut.

    Attributes:
        kernel: 'gemv', 'grouped' or 'tiled'.
        block_m: rows of a tile; 'gemv' takes all rows at once.
        block_o, block_k: outputs of a program and elements of D that a step takes (for 'grouped': each group).
        groups: parts of D summed apart in a program of 'grouped'.
        stages: depth of the software pipeline.
        warps: of a program.
    """

    kernel: str
    block_o: int
    block_k: int
    block_m: int = 16
    groups: int = 1
    stages: int = 1
    warps: int = 4

    @classmethod
    def parse(cls, text: str) -> LinearConfig:
        """From what `str` gives, e.g. 'grouped m16 o16 k64 g4 s4 w4'.

        Raises:
            ValueError: no such kernel or field.
        """
        kernel, *parts = text.split()
        if kernel not in _KERNELS:
            raise ValueError(f"{text!r}: no kernel {kernel!r}; there are: {', '.join(_KERNELS)}")
        fields: dict[str, int] = {}
        for part in parts:
            match = re.fullmatch(r"([a-z])(\d+)", part)
            if match is None or match[1] not in _KERNELS[kernel]:
                raise ValueError(f"{text!r}: {part!r} is no field of {kernel}, which has {_KERNELS[kernel]}")
            fields[_FIELDS[match[1]]] = int(match[2])
        return cls(kernel, **fields)

    def __str__(self) -> str:
        fields = (f"{letter}{getattr(self, _FIELDS[letter])}" for letter in _KERNELS[self.kernel])
        return " ".join([self.kernel, *fields])


# Batch-invariant: both give each output one accumulator over ascending D, on the same (warp-group) instruction.
_INVARIANT_FEW_ROWS = LinearConfig("tiled", block_m=64, block_o=16, block_k=128, stages=4, warps=4)
_INVARIANT_SOME_ROWS = LinearConfig("tiled", block_m=64, block_o=64, block_k=64, stages=4, warps=4)
_INVARIANT_MANY_ROWS = LinearConfig("tiled", block_m=128, block_o=128, block_k=64, stages=4, warps=8)
_INVARIANT_FLOAT32 = LinearConfig("tiled", block_m=32, block_o=32, block_k=32, stages=2, warps=4)


def invariant_config(num_rows: int, dtype: torch.dtype) -> LinearConfig:
    """The tile that serves a number of rows when no result may depend on that number."""
    if dtype == torch.float32:
        return _INVARIANT_FLOAT32
    if num_rows <= 64:
        return _INVARIANT_FEW_ROWS
    return _INVARIANT_SOME_ROWS if num_rows <= 256 else _INVARIANT_MANY_ROWS


def choose(kind: Kind, x: Tensor, weight: Tensor) -> LinearConfig | None:
    """The kernel for x [..., D] and a weight [O, D] on a GPU; None for cuBLAS and separate operations.

    Fused kinds are separate in batch-invariant mode: their norms and activations work row by row anyway.
    """
    num_rows = x.numel() // x.shape[-1]
    if is_batch_invariant():
        return invariant_config(num_rows, x.dtype) if kind == "linear" and num_rows else None
    if x.dtype == torch.float32 or not _is_measured(x.device):
        return None
    return _measured(kind, num_rows, weight.shape[0], weight.shape[1])


@functools.cache
def _is_measured(device: torch.device) -> bool:
    """Whether the table speaks of this kind of GPU: Hopper."""
    return torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache(maxsize=4096)
def _measured(kind: Kind, num_rows: int, out_size: int, in_size: int) -> LinearConfig | None:
    by_rows = TABLE.get((kind, out_size, in_size))
    if by_rows is None or out_size < _MIN_OUT_SIZE:
        return None
    for most_rows, text in sorted(by_rows.items()):
        if 0 < num_rows <= most_rows:
            return None if text == SEPARATE else LinearConfig.parse(text)
    return None
