"""What a checkpoint gives the loader: named tensors, read when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tercet.errors import UnsupportedModelError

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class WeightsError(UnsupportedModelError):
    """A checkpoint and its config do not fit together; the message names the tensor or file."""


class NamedWeight(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        name: in the Hugging Face form, e.g. `model.layers.0.self_attn.q_proj.weight`.
        nbytes: how much of the checkpoint it is.
        read: gives the full tensor, on the CPU, of one of FLOAT_TYPES; may be called once.
    """

    name: str
    nbytes: int
    read: Callable[[], Tensor]
