"""Triton's `prepare_step` against its reference, run as `triton_cases.py` is."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from tercet.ops import triton_step
from tercet.ops.step_state import RowTensors, StepBuffer, StepTensors, prepare_step

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BLOCK_SIZE = 16
MAX_LEN = 700
UNWRITTEN = -7
# What numpy says of the interpreter's scalars.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


class Case:
    """Rows of random lengths and a step over some of them."""

    def __init__(
        self, seed: int, num_rows: int, num_decodes: int, chunk_lens: list[int], padding: int
    ) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.layout = StepBuffer(num_rows, max_changes=num_rows + 3)
        num_blocks = -(-MAX_LEN // BLOCK_SIZE)
        lengths = torch.randint(1, MAX_LEN, (num_rows,), dtype=torch.int32)
        self.rows = RowTensors(
            torch.randint(1, 999, (num_rows, MAX_LEN + 1), dtype=torch.int32),
            lengths,
            torch.rand(num_rows) < 0.2,
            torch.randint(1, 99, (num_rows, num_blocks + 1), dtype=torch.int32),
        )
        order = rng.sample(range(num_rows), num_decodes + len(chunk_lens))
        starts = [rng.randrange(MAX_LEN - length) for length in chunk_lens]
        self.num_tokens = num_decodes + sum(chunk_lens)
        self.num_sequences = len(order)
        samples = [i for i in range(self.num_sequences) if i < num_decodes or rng.random() < 0.5]
        self.num_samples = len(samples)
        query_start = np.cumsum([0, *[1] * num_decodes, *chunk_lens])
        # The row that decodes first gets a new last block: the change must come before it is read.
        changes = [(order[0], (int(lengths[order[0]]) - 1) // BLOCK_SIZE, 55)] if num_decodes else []
        self.padded = self.num_tokens + padding
        host = np.full(self.layout.size, 123456, np.int32)
        host[:5] = num_decodes, len(chunk_lens), self.num_tokens, self.num_samples, len(changes)
        for start, values in (
            (self.layout.changes, np.array(changes).ravel()),
            (self.layout.seq_row, order),
            (self.layout.seq_start + num_decodes, starts),
            (self.layout.query_start, query_start),
            (self.layout.sample_token, query_start[np.array(samples, int) + 1] - 1),
            (self.layout.sample_row, np.array(order)[samples]),
        ):
            host[start : start + len(values)] = values
        self.buffer = torch.from_numpy(host)

    def run(self, triton: bool) -> tuple[RowTensors, StepTensors]:
        device = DEVICE if triton else "cpu"
        rows = RowTensors(*(getattr(self.rows, name).clone().to(device) for name in RowTensors.__slots__))

        def unwritten(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, UNWRITTEN, dtype=dtype, device=device)

        size, num_rows = self.padded + 5, self.layout.num_rows
        step = StepTensors(
            unwritten(size),
            unwritten(size, dtype=torch.int64),
            unwritten(size, dtype=torch.int64),
            unwritten(num_rows),
            unwritten(num_rows, rows.block_table_RN.shape[1]),
            unwritten(num_rows),
            unwritten(num_rows),
            unwritten(num_rows),
        )
        prepare = triton_step.prepare_step if triton else prepare_step
        prepare(
            self.buffer.to(device), self.layout, rows, step, block_size=BLOCK_SIZE, num_tokens=self.padded
        )
        return rows, step


@pytest.mark.parametrize(
    ("num_rows", "num_decodes", "chunk_lens", "padding"),
    [
        (1, 1, [], 0),
        (40, 33, [], 7),
        (9, 0, [1], 0),
        (9, 0, [300, 1, 129], 2),
        (30, 12, [5, 128, 256], 100),
        (5, 0, [], 4),
    ],
)
def test_prepares_as_the_reference(
    num_rows: int, num_decodes: int, chunk_lens: list[int], padding: int
) -> None:
    case = Case(random.SystemRandom().randrange(1 << 31), num_rows, num_decodes, chunk_lens, padding)
    (rows, step), (expected_rows, expected) = case.run(triton=True), case.run(triton=False)
    assert torch.equal(rows.block_table_RN.cpu(), expected_rows.block_table_RN)
    used = {"seq_lens_B": case.num_sequences, "frozen_S": case.num_samples}
    for name in StepTensors.__slots__:
        got, want = getattr(step, name).cpu(), getattr(expected, name)
        if name == "block_table_BN":
            for i in range(case.num_sequences):
                count = -(-int(expected.seq_lens_B[i]) // BLOCK_SIZE)
                assert torch.equal(got[i, :count], want[i, :count])
            continue
        count = used.get(name, len(want))
        assert torch.equal(got[:count], want[:count]), name


def test_pieces_land_where_they_belong() -> None:
    targets = [
        torch.full((7, 33), UNWRITTEN, dtype=torch.int32, device=DEVICE),
        torch.full((9,), 200, dtype=torch.uint8, device=DEVICE),
        torch.full((5000,), UNWRITTEN, dtype=torch.int32, device=DEVICE),
    ]
    rng = np.random.default_rng()
    writes = [
        (0, 33, rng.integers(0, 99, 20).astype(np.int32)),
        (1, 3, rng.integers(0, 99, 1).astype(np.uint8)),
        (1, 5, rng.integers(0, 99, 3).astype(np.uint8)),
        (2, 17, rng.integers(0, 99, 4500).astype(np.int32)),
    ]
    expected = [target.cpu().numpy().ravel().copy() for target in targets]
    head = 96
    arena = np.zeros(head + 20_000, np.uint8)
    pieces, offset = arena[:head].view(np.int64).reshape(-1, 3), head
    for piece, (which, start, values) in zip(pieces, writes, strict=True):
        expected[which][start : start + len(values)] = values
        address = targets[which].data_ptr() + start * values.itemsize
        piece[:] = address, offset, values.nbytes
        arena[offset : offset + values.nbytes] = values.view(np.uint8)
        offset += -(-values.nbytes // 16) * 16
    triton_step.copy_pieces(torch.from_numpy(arena).to(DEVICE), len(writes))
    for target, want in zip(targets, expected, strict=True):
        assert np.array_equal(target.cpu().numpy().ravel(), want)
