"""Small writes to tensors on the device, collected and sent together: one copy and one launch for all of a plan's.

A request that enters a row writes its tokens, blocks, length and sampling parameters into some ten tensors. As
operations of their own those would cost the launching thread ten uploads and as many launches for each request.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; pieces begin at multiples, so that they can be copied in words
_PIECE = np.dtype([("target", np.int64), ("offset", np.int64), ("size", np.int64)])


class Patches:
    """Writes that take effect, in no particular order, at the next `flush`; on a CPU at once.

    Targets must live until then, and must not overlap within one flush.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cpu = device.type == "cpu"
        self._pieces: list[tuple[int, int, npt.NDArray[Any]]] = []
        self._size = 0  # of the data so far, in bytes

    def write(self, target: Tensor, start: int, values: npt.NDArray[Any]) -> None:
        """Replace elements [start, start + len(values)) of the flattened target.

        Args:
            target: contiguous, on the device.
            values: of the target's element size; not to be changed before the flush.
        """
        values = np.ascontiguousarray(values)
        item = target.element_size()
        if values.itemsize != item or not 0 <= start <= target.numel() - values.size:
            raise ValueError(
                f"{values.size} values of {values.itemsize} bytes at {start} of {tuple(target.shape)}"
            )
        if not values.size:
            return
        address = target.data_ptr() + start * item
        if self._is_cpu:
            ctypes.memmove(address, values.ctypes.data, values.nbytes)
            return
        self._pieces.append((address, self._size, values))
        self._size += -(-values.nbytes // _ALIGNMENT) * _ALIGNMENT

    def flush(self) -> None:
        """Send what was written. The host does not wait."""
        if not self._pieces:
            return
        from tercet.ops import triton_step

        head = -(-len(self._pieces) * _PIECE.itemsize // _ALIGNMENT) * _ALIGNMENT
        staged = torch.empty(head + self._size, dtype=torch.uint8, pin_memory=True)
        host = staged.numpy()
        pieces = host[: len(self._pieces) * _PIECE.itemsize].view(_PIECE)
        for i, (address, offset, values) in enumerate(self._pieces):
            start = head + offset
            host[start : start + values.nbytes] = values.reshape(-1).view(np.uint8)
            pieces[i] = (address, start, values.nbytes)
        triton_step.copy_pieces(staged.to(self._device, non_blocking=True), len(self._pieces))
        self._pieces.clear()
        self._size = 0
