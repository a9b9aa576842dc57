"""From a plan to the tensors of its step: which tokens run, at which positions, with which blocks.

Everything about decoding rows comes from the device's own state; only the chunks' columns are uploaded, so a
step of pure decode copies nothing to the device while its batch stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tercet.ops import AttentionMetadata
from tercet.worker_proc.device_batch import Chunks, DeviceBatch, IntArray
from tercet.worker_proc.row_table import upload


@dataclass(frozen=True, slots=True)
class DecodeRowsOnDevice:
    """The decoding rows of a batch version, on host and device."""

    version: int
    rows: IntArray
    row_B: Tensor  # i64


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a forward pass needs, and which rows sample after it."""

    token_ids_T: Tensor  # i64
    positions_T: Tensor  # i64
    meta: AttentionMetadata
    sample_rows: IntArray  # rows that sample, in the order of sample_index_S
    sample_row_S: Tensor  # i64, the same on the device
    sample_index_S: Tensor | None  # i64, their places in T; None for all, in order
    frozen_S: Tensor  # bool, rows that finished in an earlier step


class StepBuilder:
    """Builds the inputs of steps over one batch."""

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch
        self._decode = DecodeRowsOnDevice(-1, np.zeros(0, np.int32), torch.zeros(0, dtype=torch.int64))

    def build(self, chunks: Chunks, max_len: int) -> StepInputs:
        """Inputs of a step that runs the decoding rows and these chunks.

        Args:
            max_len: no row that runs is longer after the step.
        """
        batch, decode = self._batch, self._decoding_rows()
        decode_length_B = batch.lengths_R[decode.row_B]
        decode_position_B = (decode_length_B - 1).long()
        if not len(chunks.row):
            return self._decode_only(decode, decode_length_B, decode_position_B, max_len)
        chunk_row_T = np.repeat(chunks.row, chunks.length)
        first_T = np.repeat(np.cumsum(chunks.length) - chunks.length, chunks.length)
        chunk_position_T = np.repeat(chunks.start, chunks.length) + np.arange(len(chunk_row_T)) - first_T
        uploaded = upload(np.stack((chunk_row_T, chunk_position_T)).astype(np.int64), batch.device)
        row_T = torch.cat((decode.row_B, uploaded[0]))
        position_T = torch.cat((decode_position_B, uploaded[1]))
        num_decodes = len(decode.rows)
        seq_ends = (chunks.start + chunks.length).astype(np.int32)
        row_S = torch.cat((decode.row_B, upload(chunks.row.astype(np.int64), batch.device)))
        meta = AttentionMetadata(
            num_decodes=num_decodes,
            block_table_BN=self._block_table(row_S, max_len),
            seq_lens_B=torch.cat((decode_length_B, upload(seq_ends, batch.device))),
            query_start_B1=upload(_starts(num_decodes, chunks.length), batch.device),
            slot_mapping_T=self._slots(row_T, position_T),
            max_query_len=int(chunks.length.max()),
            max_seq_len=max_len,
            chunk_query_lens=tuple(chunks.length.tolist()),
            chunk_seq_lens=tuple(seq_ends.tolist()),
        )
        sampling = np.flatnonzero(chunks.sample)
        last = num_decodes + np.cumsum(chunks.length) - 1
        index = np.concatenate((np.arange(num_decodes), last[sampling])).astype(np.int64)
        sample_rows = np.concatenate((decode.rows, chunks.row[sampling])).astype(np.int32)
        sample_row_S = upload(sample_rows.astype(np.int64), batch.device)
        return StepInputs(
            token_ids_T=batch.history_RM[row_T, position_T].long(),
            positions_T=position_T,
            meta=meta,
            sample_rows=sample_rows,
            sample_row_S=sample_row_S,
            sample_index_S=upload(index, batch.device),
            frozen_S=batch.finished_R[sample_row_S],
        )

    def _decode_only(
        self, decode: DecodeRowsOnDevice, length_B: Tensor, position_B: Tensor, max_len: int
    ) -> StepInputs:
        batch, row_B, count = self._batch, decode.row_B, len(decode.rows)
        meta = AttentionMetadata(
            num_decodes=count,
            block_table_BN=self._block_table(row_B, max_len),
            seq_lens_B=length_B,
            query_start_B1=torch.arange(count + 1, dtype=torch.int32, device=batch.device),
            slot_mapping_T=self._slots(row_B, position_B),
            max_query_len=1,
            max_seq_len=max_len,
        )
        return StepInputs(
            token_ids_T=batch.history_RM[row_B, position_B].long(),
            positions_T=position_B,
            meta=meta,
            sample_rows=decode.rows,
            sample_row_S=row_B,
            sample_index_S=None,
            frozen_S=batch.finished_R[row_B],
        )

    def _decoding_rows(self) -> DecodeRowsOnDevice:
        decoding = self._batch.decoding
        if self._decode.version != decoding.version:
            rows = decoding.snapshot()
            row_B = upload(rows.astype(np.int64), self._batch.device)
            self._decode = DecodeRowsOnDevice(decoding.version, rows, row_B)
        return self._decode

    def _block_table(self, row_B: Tensor, max_len: int) -> Tensor:
        num_blocks = -(-max_len // self._batch.block_size)
        return self._batch.block_table_RN[:, :num_blocks].index_select(0, row_B)

    def _slots(self, row_T: Tensor, position_T: Tensor) -> Tensor:
        """Slots to write; frozen rows, whose blocks may belong to others by now, write to the null block."""
        return self._batch.slots(row_T, position_T).masked_fill_(self._batch.finished_R[row_T], 0)


def _starts(num_decodes: int, lengths: IntArray) -> IntArray:
    counts = np.concatenate((np.ones(num_decodes, np.int32), lengths))
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
