"""Launches the kernels of linear layers for few rows, as a `LinearConfig` says.

A launch reads the weight once and writes the output once; there is no workspace and no atomic operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tercet.ops import kernels_linear
from tercet.ops.launch import Kernel
from tercet.ops.linear_configs import MAX_GEMV_ROWS, LinearConfig
from tercet.ops.triton_support import next_power_of_2, programmatic_launch

if TYPE_CHECKING:
    from tercet.ops.linear import Activation, PrecedingNorm

_gemv_kernel = Kernel(kernels_linear.gemv_kernel)
_grouped_linear_kernel = Kernel(kernels_linear.grouped_linear_kernel)
_tiled_linear_kernel = Kernel(kernels_linear.tiled_linear_kernel)

_PREFETCH_COLUMNS = 1024  # of each weight row, before the input is ready


def linear(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
) -> Tensor:
    """x [..., D] times the weight, transposed; with an activation, act(gate) * up of the two halves.

    Args:
        weight: [O, D], or [2 O, D] with an activation.

    Returns:
        [..., O].

    Raises:
        ValueError: sizes that do not fit, or more rows than 'gemv' takes.
    """
    if config.kernel == "gemv":
        return _gemv(config, x, weight, bias, activation, None)[0]
    _check(x, weight, bias)
    x = x.contiguous()
    size = x.shape[-1]
    num_rows, out_size = x.numel() // size, _out_size(weight, activation)
    out = torch.empty((*x.shape[:-1], out_size), dtype=x.dtype, device=x.device)
    tiles_o, tiles_m = -(-out_size // config.block_o), -(-num_rows // config.block_m)
    is_grouped = config.kernel == "grouped"
    kernel: Any = _grouped_linear_kernel if is_grouped else _tiled_linear_kernel
    launch = programmatic_launch(x.device, num_rows)
    kernel[(tiles_o, tiles_m) if is_grouped else (tiles_o * tiles_m,)](
        out,
        x,
        weight,
        x if bias is None else bias,
        num_rows,
        out_size,
        D=size,
        BLOCK_M=config.block_m,
        BLOCK_O=config.block_o,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        PREFETCH=min(next_power_of_2(size), _PREFETCH_COLUMNS),
        GATED=activation is not None,
        GELU=activation == "gelu_tanh",
        BIAS=bias is not None,
        PDL=bool(launch),
        num_warps=config.warps,
        **({"GROUPS": config.groups} if is_grouped else {}),
        **launch,
    )
    return out


def add_rms_norm_linear(
    config: LinearConfig,
    x: Tensor,
    norm: PrecedingNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear` of norm(x + norm.residual), and that sum. The config is 'gemv' with block_k of at least D."""
    if config.kernel != "gemv" or config.block_k < x.shape[-1]:
        raise ValueError(f"{config} does not see a whole row of {x.shape[-1]}, which a norm needs")
    return _gemv(config, x, weight, bias, activation, norm)


def _gemv(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    norm: PrecedingNorm | None,
) -> tuple[Tensor, Tensor]:
    """The product and, with a norm, the sum that was normalised."""
    _check(x, weight, bias)
    x = x.contiguous()
    size = x.shape[-1]
    num_rows, out_size = x.numel() // size, _out_size(weight, activation)
    if not 1 <= num_rows <= MAX_GEMV_ROWS:
        raise ValueError(f"{config} takes 1 to {MAX_GEMV_ROWS} rows; got {num_rows}")
    out = torch.empty((*x.shape[:-1], out_size), dtype=x.dtype, device=x.device)
    total = x if norm is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = programmatic_launch(x.device, num_rows)
    _gemv_kernel[(-(-out_size // config.block_o),)](
        out,
        x,
        weight,
        x if bias is None else bias,
        x if norm is None else norm.residual.contiguous(),
        total,
        x if norm is None else norm.weight_D,
        0.0 if norm is None else norm.eps,
        0.0 if norm is None else norm.weight_offset,
        out_size,
        D=size,
        ROWS=num_rows,
        BLOCK_O=config.block_o,
        BLOCK_K=config.block_k,
        GATED=activation is not None,
        GELU=activation == "gelu_tanh",
        BIAS=bias is not None,
        NORM=norm is not None,
        PDL=bool(launch),
        num_warps=config.warps,
        **launch,
    )
    return out, total


def _out_size(weight: Tensor, activation: Activation | None) -> int:
    return weight.shape[0] if activation is None else weight.shape[0] // 2


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.shape[1] != x.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"x {list(x.shape)}, weight {list(weight.shape)} and "
            f"bias {None if bias is None else list(bias.shape)} do not fit"
        )
    if not weight.is_contiguous():
        raise ValueError(f"the weight {list(weight.shape)} must be contiguous")
