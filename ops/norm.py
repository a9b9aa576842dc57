"""Root-mean-square layer normalisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tercet.ops.registry import operation
from tercet.ops.triton_support import TRITON, on_cuda


@operation("rms_norm")
def rms_norm(x: Tensor, weight_D: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight_offset + weight), over the last dimension.

    Computed in float32, whatever the dtype.

    Args:
        x: [..., D].
        weight_D: [D].
        eps: added to the mean of squares.
        weight_offset: 1 for the models (Gemma) that store the weight's distance from 1.

    Source: Zhang and Sennrich 2019.
    """
    weight = weight_D.float()
    if weight_offset:
        weight = weight + weight_offset
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


@operation("add_rms_norm")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum x + residual, normalised, and the sum itself (the next residual).

    Args: as `rms_norm`; residual has the shape of x.
    """
    total = x + residual
    return rms_norm(total, weight_D, eps, weight_offset), total


rms_norm.kernel(TRITON, "tercet.ops.triton_rows", supports=on_cuda)


add_rms_norm.kernel(TRITON, "tercet.ops.triton_rows", supports=on_cuda)
