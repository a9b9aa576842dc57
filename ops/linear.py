"""Linear layers, alone or with what stands around them: a norm before, a gated activation after.

The kernels for few rows, and what is measured to be the better of them and cuBLAS for each shape, are behind
`triton_linear`. With `invariance.is_batch_invariant()` a row's result depends on that row alone, bitwise.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from tercet.ops.activation import gelu_tanh_and_mul, silu_and_mul
from tercet.ops.linear_configs import choose
from tercet.ops.norm import add_rms_norm
from tercet.ops.registry import operation
from tercet.ops.triton_support import TRITON, on_cuda

Activation = Literal["silu", "gelu_tanh"]
GATED_ACTIVATIONS = {"silu": silu_and_mul, "gelu_tanh": gelu_tanh_and_mul}


class PrecedingNorm(NamedTuple):
    """The arguments of `ops.add_rms_norm` but for x: what is added first, and the norm."""

    residual: Tensor
    weight_D: Tensor
    eps: float
    weight_offset: float = 0.0


@operation("linear")
def linear(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x times the weight, transposed, plus the bias; accumulated in float32 on a GPU.

    Args:
        x: [..., D].
        weight_OD, bias_O: of x's dtype and on its device.

    Returns:
        [..., O].
    """
    return F.linear(x, weight_OD, bias_O)


@operation("gated_linear")
def gated_linear(
    x: Tensor, gate_up_weight: Tensor, bias: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    """act(x Wg^T + bg) * (x Wu^T + bu): the first half of a gated feed-forward layer as one operation.

    Args:
        x: [..., D].
        gate_up_weight: [2 F, D]; the first half of the rows is the gate's.
        bias: [2 F], in the same order.

    Returns:
        [..., F]. A kernel that fuses rounds once; otherwise the product is rounded before the activation.

    Source: Shazeer 2020.
    """
    return GATED_ACTIVATIONS[activation](linear(x, gate_up_weight, bias))


@operation("add_rms_norm_linear")
def add_rms_norm_linear(
    x: Tensor, norm: PrecedingNorm, weight_OD: Tensor, bias_O: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`linear` of the normalised sum x + norm.residual, and that sum, of the shape of x (the next residual)."""
    normed, total = add_rms_norm(x, *norm)
    return linear(normed, weight_OD, bias_O), total


@operation("add_rms_norm_gated_linear")
def add_rms_norm_gated_linear(
    x: Tensor,
    norm: PrecedingNorm,
    gate_up_weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    """`gated_linear` of the normalised sum x + norm.residual, and that sum, of the shape of x."""
    normed, total = add_rms_norm(x, *norm)
    return gated_linear(normed, gate_up_weight, bias, activation), total


@linear.implementation(TRITON, supports=on_cuda)
def _linear_triton(x: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    config = choose("linear", x, weight_OD)
    if config is None:
        return linear.reference(x, weight_OD, bias_O)
    from tercet.ops import triton_linear

    return triton_linear.linear(config, x, weight_OD, bias_O)


@gated_linear.implementation(TRITON, supports=on_cuda)
def _gated_linear_triton(
    x: Tensor, gate_up_weight: Tensor, bias: Tensor | None = None, activation: Activation = "silu"
) -> Tensor:
    config = choose("gated", x, gate_up_weight)
    if config is None:
        return gated_linear.reference(x, gate_up_weight, bias, activation)
    from tercet.ops import triton_linear

    return triton_linear.linear(config, x, gate_up_weight, bias, activation=activation)


@add_rms_norm_linear.implementation(TRITON, supports=on_cuda)
def _add_rms_norm_linear_triton(
    x: Tensor, norm: PrecedingNorm, weight_OD: Tensor, bias_O: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    config = choose("norm_linear", x, weight_OD)
    if config is None:
        return add_rms_norm_linear.reference(x, norm, weight_OD, bias_O)
    from tercet.ops import triton_linear

    return triton_linear.add_rms_norm_linear(config, x, norm, weight_OD, bias_O)


@add_rms_norm_gated_linear.implementation(TRITON, supports=on_cuda)
def _add_rms_norm_gated_linear_triton(
    x: Tensor,
    norm: PrecedingNorm,
    gate_up_weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation = "silu",
) -> tuple[Tensor, Tensor]:
    config = choose("norm_gated", x, gate_up_weight)
    if config is None:
        return add_rms_norm_gated_linear.reference(x, norm, gate_up_weight, bias, activation)
    from tercet.ops import triton_linear

    return triton_linear.add_rms_norm_linear(config, x, norm, gate_up_weight, bias, activation=activation)
