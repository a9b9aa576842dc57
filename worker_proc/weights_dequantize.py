"""GGUF storage types to floats, vectorised over blocks.

Each function takes the raw bytes of n blocks, uint8 [n, bytes per block], and gives float32 [n, elements per
block]. Names of the fields are those of ggml. Tensors are dequantised a slice at a time, so that the
temporaries stay in cache and memory holds little beside the result.

Source: ggml `src/ggml-quants.c` (the layouts) and `docs/gguf.md`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tercet.errors import UnsupportedModelError
from tercet.gguf import BLOCK_SIZES, GGMLType, GGUFTensor

_SLICE_ELEMENTS = 1 << 17  # 0.55 s for 135M weights on one core; 1.0 s at 1 << 20


def dequantize(tensor: GGUFTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a GGUF file, on the CPU, in its shape.

    Raises:
        UnsupportedModelError: a storage type that is not implemented; the message lists those that are.
    """
    raw = _as_torch(tensor.data)
    if (plain := _PLAIN_TYPES.get(tensor.type)) is not None:
        return raw.view(plain).view(tensor.shape).to(dtype)
    convert = _BLOCK_TYPES.get(tensor.type)
    if convert is None:
        known = ", ".join(supported_types())
        stored = tensor.type.name
        raise UnsupportedModelError(f"tensor {tensor.name!r} is stored as {stored}, not one of: {known}")
    elements, size = BLOCK_SIZES[tensor.type]
    blocks = raw.view(-1, size)
    out = torch.empty((blocks.shape[0], elements), dtype=dtype)
    step = _SLICE_ELEMENTS // elements
    for i in range(0, blocks.shape[0], step):
        out[i : i + step] = convert(blocks[i : i + step])
    return out.view(tensor.shape)


def supported_types() -> tuple[str, ...]:
    """Names of the storage types that can be read."""
    return tuple(kind.name for kind in (*_PLAIN_TYPES, *_BLOCK_TYPES))


def _as_torch(data: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    with warnings.catch_warnings():
        # The map is read-only and torch cannot say so; nothing here writes to it.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(data)


def _half(blocks: Tensor, start: int) -> Tensor:
    """A float16 field as float32 [n, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(qs: Tensor) -> Tensor:
    """[..., m] bytes to [..., 2 m] values: all the low halves, then all the high ones."""
    return torch.cat((qs & 0xF, qs >> 4), dim=-1)


def _q4_0(blocks: Tensor) -> Tensor:
    return (_nibbles(blocks[:, 2:]).float() - 8) * _half(blocks, 0)


def _q4_1(blocks: Tensor) -> Tensor:
    return torch.addcmul(_half(blocks, 2), _nibbles(blocks[:, 4:]).float(), _half(blocks, 0))


def _fifth_bits(qh: Tensor) -> Tensor:
    """[n, 4] bytes to the 32 bits, each as 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((qh[:, :, None] >> shifts) & 1).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (q.float() - 16) * _half(blocks, 0)


def _q5_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return torch.addcmul(_half(blocks, 2), q.float(), _half(blocks, 0))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _crumbs(qs: Tensor) -> Tensor:
    """[n, 64] bytes of 2-bit values to [n, 2, 4, 32]: halves of 128, in each four shifts of 32 bytes."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return (qs.reshape(-1, 2, 1, 32) >> shifts) & 3


def _q2_k(blocks: Tensor) -> Tensor:
    scales, qs = blocks[:, :16], blocks[:, 16:80]
    d, dmin = _half(blocks, 80), _half(blocks, 82)
    q = _crumbs(qs).reshape(-1, 16, 16).float()
    scale, offset = d * (scales & 0xF).float(), dmin * (scales >> 4).float()
    return (scale[:, :, None] * q - offset[:, :, None]).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    hmask, qs, packed, d = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108], _half(blocks, 108)
    # 16 scales of 6 bits: 4 low bits in bytes 0-7, 2 high bits in bytes 8-11
    low = _nibbles(packed[:, :8])
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = ((packed[:, None, 8:] >> shifts) & 3).flatten(1)
    scales = d * ((low | high << 4).float() - 32)
    bits = torch.arange(8, dtype=torch.uint8).view(2, 4, 1)
    third = (hmask.reshape(-1, 1, 1, 32) >> bits) & 1
    q = (_crumbs(qs) | third << 2).reshape(-1, 16, 16).float() - 4
    return (scales[:, :, None] * q).flatten(1)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes to 8 scales and 8 minima of 6 bits, as Q4_K and Q5_K pack them."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (third & 0xF) | (first >> 6) << 4), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Tensor:
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).float()
    return ((d * scales)[:, :, None] * q - (dmin * minima)[:, :, None]).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    d, dmin = _half(blocks, 0), _half(blocks, 2)
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    fifth = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return ((d * scales)[:, :, None] * q.float() - (dmin * minima)[:, :, None]).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    ql, qh = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    scales = blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208)
    low = _nibbles(ql).reshape(-1, 2, 4, 32)
    high = (qh >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]) & 3
    q = (low | high << 4).reshape(-1, 16, 16).float() - 32
    return (scales[:, :, None] * q).flatten(1)


_PLAIN_TYPES: dict[GGMLType, torch.dtype] = {
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
}
_BLOCK_TYPES: dict[GGMLType, Callable[[Tensor], Tensor]] = {
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
}
