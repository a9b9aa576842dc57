"""Rotary position embedding applied to queries and keys (the frequencies are the worker's `rope.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from tercet.ops.registry import operation


@operation("apply_rotary")
def apply_rotary(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate each head's first R elements by the token's angles; the rest pass through.

    Element i is paired with element i + R / 2 (the NeoX form, which Hugging Face checkpoints use).

    Args:
        x_THD: queries or keys.
        cos_TR, sin_TR: [T, R], x's dtype; both halves of the last dimension hold the same angles.

    Returns:
        [T, H, D], a new tensor.

    Source: RoFormer, Su et al. 2021.
    """
    rotary_dim = cos_TR.shape[-1]
    cos_T1R, sin_T1R = cos_TR[:, None], sin_TR[:, None]
    rotated = x_THD[..., :rotary_dim]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos_T1R + torch.cat((-second, first), dim=-1) * sin_T1R
    if rotary_dim == x_THD.shape[-1]:
        return rotated
    return torch.cat((rotated, x_THD[..., rotary_dim:]), dim=-1)
