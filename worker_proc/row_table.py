"""A small table by row that is written on the host and read on the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.worker_proc.patches import Patches


class RowTable:
    """One line of numbers per row, on host and device.

    Writes go to the host's copy; `device_table` sends the lines written since. Lines are as wide as the widest
    written so far, rounded up to a power of two.

    Args:
        num_rows: number of lines.
        shape: shape of a line at first.
        dtype: of the numbers.
        fill: what a line holds where nothing was written.
        device: where the device's copy lives.
        patches: what brings lines there.
    """

    def __init__(
        self,
        num_rows: int,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        fill: float,
        device: torch.device,
        patches: Patches,
    ) -> None:
        self._fill = fill
        self._device = device
        self._patches = patches
        self._host = np.full((num_rows, *shape), fill, dtype=dtype)
        self._table = upload(self._host.copy(), device)
        self._dirty: set[int] = set()

    def write(self, row: int, values: npt.ArrayLike) -> None:
        """Replace a line; the rest of it, if any, is filled."""
        array = np.asarray(values, dtype=self._host.dtype)
        self._grow(array.shape)
        line = self._host[row]
        line[...] = self._fill
        line[tuple(map(slice, array.shape))] = array
        self._dirty.add(row)

    def device_table(self) -> Tensor:
        """The table as tensor[num_rows, ...], up to date with every write so far once `patches` is flushed."""
        if self._table.shape != self._host.shape:
            self._table = upload(self._host.copy(), self._device)
        elif self._dirty:
            width = self._host[0].size
            for row in self._dirty:
                self._patches.write(self._table, row * width, self._host[row].copy())
        self._dirty.clear()
        return self._table

    def _grow(self, shape: tuple[int, ...]) -> None:
        old = self._host.shape[1:]
        if all(need <= have for need, have in zip(shape, old, strict=True)):
            return
        new = [
            have if need <= have else 1 << (need - 1).bit_length()
            for need, have in zip(shape, old, strict=True)
        ]
        grown = np.full((len(self._host), *new), self._fill, dtype=self._host.dtype)
        grown[(slice(None), *map(slice, old))] = self._host
        self._host = grown


def upload(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """The array as a tensor on the device. The host does not wait; on a CPU the memory is shared."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
