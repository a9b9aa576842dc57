"""Gated activations of the feed-forward layers, over a merged gate and up projection."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tercet.ops.registry import operation
from tercet.ops.triton_support import TRITON, on_cuda


@operation("silu_and_mul")
def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [..., 2 F]; the first half of the last dimension is the gate.

    Returns:
        [..., F].

    Source: SwiGLU, Shazeer 2020.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@operation("gelu_tanh_and_mul")
def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation of gelu; shapes as `silu_and_mul`.

    Source: GEGLU, Shazeer 2020.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


silu_and_mul.kernel(TRITON, "tercet.ops.triton_rows", supports=on_cuda)


gelu_tanh_and_mul.kernel(TRITON, "tercet.ops.triton_rows", supports=on_cuda)
