"""The persistent batch: what the device knows of its rows, and how plans change it.

A request is admitted into a row and stays there. The device holds each row's tokens, length, blocks and whether
it has finished, and advances them itself; the host keeps generations, states and the list of decoding rows, which
change with plans only. Dimensions: R rows, M max_model_len, N blocks of a row, B sequences, T tokens of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.ipc.messages import Admission, Audit, RowState, StepPlan
from tercet.worker_proc.audit import check_audit
from tercet.worker_proc.patches import Patches
from tercet.worker_proc.row_table import upload

_FREE = 255
_NOT_FINISHED = np.zeros(1, np.bool_)
IntArray = npt.NDArray[np.int32]


class DecodeRows:
    """The rows in state DECODE, dense: the last one moves into the place of one that leaves."""

    def __init__(self, num_rows: int) -> None:
        self._rows = np.zeros(num_rows, np.int32)
        self._place = np.full(num_rows, -1, np.int32)
        self.count = 0
        self.version = 0

    def add(self, row: int) -> None:
        if self._place[row] < 0:
            self._place[row] = self.count
            self._rows[self.count] = row
            self.count += 1
            self.version += 1

    def discard(self, row: int) -> None:
        place = self._place[row]
        if place >= 0:
            self.count -= 1
            last = self._rows[self.count]
            self._rows[place] = last
            self._place[last] = place
            self._place[row] = -1
            self.version += 1

    def clear(self) -> None:
        self._place[:] = -1
        self.count = 0
        self.version += 1

    def snapshot(self) -> IntArray:
        """The rows now, in the order of the batch."""
        return self._rows[: self.count].copy()


@dataclass(frozen=True, slots=True)
class Chunks:
    """A step's chunks as host columns."""

    row: IntArray
    start: IntArray
    length: IntArray
    sample: IntArray

    @staticmethod
    def of(plan: StepPlan) -> Chunks:
        columns = plan.chunks if plan.chunks is not None else np.zeros((0, 4), np.int32)
        return Chunks(*(np.ascontiguousarray(column) for column in columns.T))


class DeviceBatch:
    """Rows on the device. All methods run on the worker's launching thread."""

    def __init__(
        self,
        num_rows: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        patches: Patches | None = None,
    ) -> None:
        """
        Args:
            patches: what writes admissions to the device; to be flushed before the next step. None on a CPU.
        """
        self.num_rows = num_rows
        self._patches = patches or Patches(device)
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_model_len // block_size) + 1
        # One column more than a row can fill: frozen rows write their void tokens there.
        self.history_RM = _zeros((num_rows, max_model_len + 1), np.int32, device)
        self.block_table_RN = _zeros((num_rows, max_blocks), np.int32, device)
        self.lengths_R = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self.finished_R = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.decoding = DecodeRows(num_rows)
        self.gen = np.zeros(num_rows, np.int32)
        self.state = np.full(num_rows, _FREE, np.uint8)

    def release(self, row: int) -> None:
        self.state[row] = _FREE
        self.decoding.discard(row)

    def admit(self, admission: Admission) -> None:
        """Write a request into a free row."""
        row, length = admission.row, len(admission.token_ids)
        if not 0 <= row < self.num_rows or self.state[row] != _FREE:
            raise RuntimeError(f"row {row} was given away twice, or does not exist")
        self.gen[row] = admission.gen
        self.state[row] = RowState.PREFILL
        write = self._patches.write
        write(self.history_RM, row * self.history_RM.shape[1], np.array(admission.token_ids, np.int32))
        write(
            self.block_table_RN, row * self.block_table_RN.shape[1], np.array(admission.blocks[0], np.int32)
        )
        write(self.lengths_R, row, np.array([length], np.int32))
        write(self.finished_R, row, _NOT_FINISHED)

    def set_states(self, changes: IntArray) -> None:
        """changes: [k, 2] of (row, RowState)."""
        for row, state in changes.tolist():
            self.state[row] = state
            if state == RowState.DECODE:
                self.decoding.add(row)
            else:
                self.decoding.discard(row)

    def set_blocks(self, changes: IntArray) -> None:
        """changes: [k, 4] of (group, row, index, block), in one copy to the device."""
        on_device = upload(np.array(changes, np.int64), self.device)
        _, row, index, block = on_device.unbind(1)
        self.block_table_RN.index_put_((row, index), block.int())

    def clear(self) -> None:
        """Forget every row."""
        self.state[:] = _FREE
        self.decoding.clear()

    def slots(self, row_T: Tensor, position_T: Tensor) -> Tensor:
        """Cache slots (block * block_size + offset) of positions."""
        block_T = self.block_table_RN[row_T, position_T // self.block_size].long()
        return block_T * self.block_size + position_T % self.block_size

    def append(self, row_B: Tensor, token_B: Tensor, finish_B: Tensor, frozen_B: Tensor) -> None:
        """Each row that is not frozen gets its token; one with a finish is frozen from now on."""
        length_B = self.lengths_R[row_B]
        place_B = torch.where(frozen_B, self.history_RM.shape[1] - 1, length_B.long())
        self.history_RM.index_put_((row_B, place_B), token_B.int())
        self.lengths_R.index_put_((row_B,), length_B + (~frozen_B).int())
        self.finished_R.index_put_((row_B,), frozen_B | (finish_B != 0))

    def audit(self, audit: Audit) -> None:
        """Compare with the core's tables. Copies the table from the device: for tests.

        Raises:
            AssertionError: they differ.
        """
        check_audit(audit, self.gen, self.state, self.block_table_RN.cpu().numpy())


def _zeros(shape: tuple[int, ...], dtype: npt.DTypeLike, device: torch.device) -> Tensor:
    """Zeros; on a CPU pages are only touched when written (numpy's zeros are calloc's)."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(shape, dtype))
    return torch.zeros(shape, dtype=torch.from_numpy(np.zeros(0, dtype)).dtype, device=device)


def zeros_like_cpu_lazy(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of a torch dtype under the same rule: the cache may be far larger than what is ever used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, np.uint8)).view(dtype).view(shape)
