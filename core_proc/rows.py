"""The core's mirror of the worker's persistent batch: one row per running request, as numpy columns.

Columns, not objects: what changes in every row at every step is one vector operation, whatever the batch.
"""

from __future__ import annotations

import numpy as np

from tercet.core_proc.request import NO_ROW, Request
from tercet.ipc.messages import RowState

FREE = 255  # in `state`: no request owns the row


class RowTable:
    """Columns over rows. For a row r:

    known[r]    tokens that the core has: prompt and results applied
    planned[r]  tokens that will exist once every plan sent has run; known <= planned <= limit
    computed[r] tokens whose keys and values are in the cache once every plan sent has run
    capacity[r] tokens that its blocks can hold
    gen[r]      counts owners, so that results in flight for an earlier one are told apart
    """

    def __init__(self, num_rows: int, max_model_len: int, block_size: int) -> None:
        self.num_rows = num_rows
        self.block_size = block_size
        self.gen = np.zeros(num_rows, np.int32)
        self.state = np.full(num_rows, FREE, np.uint8)
        self.known = np.zeros(num_rows, np.int32)
        self.planned = np.zeros(num_rows, np.int32)
        self.computed = np.zeros(num_rows, np.int32)
        self.capacity = np.zeros(num_rows, np.int32)
        self.limit = np.zeros(num_rows, np.int32)
        self.prompt_len = np.zeros(num_rows, np.int32)
        self.handle = np.zeros(num_rows, np.uint64)
        self.frontend = np.zeros(num_rows, np.int32)
        self.last_token_s = np.full(num_rows, np.nan)  # when the last token's result was applied
        self.unstarted = np.zeros(num_rows, np.bool_)  # no token sent since it was added
        # Pages of these two are only touched as sequences grow into them.
        self.tokens = np.zeros((num_rows, max_model_len + 1), np.int32)
        self.blocks = np.zeros((num_rows, -(-max_model_len // block_size) + 1), np.int32)
        self.requests: list[Request | None] = [None] * num_rows
        self._free = list(range(num_rows - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_running(self) -> int:
        return self.num_rows - len(self._free)

    def occupied(self) -> list[int]:
        """Rows that a request owns."""
        return [int(row) for row in np.flatnonzero(self.state != FREE)]

    def blocks_of(self, row: int) -> list[int]:
        """Blocks of a row, in the order of its tokens."""
        held: list[int] = self.blocks[row, : self.capacity[row] // self.block_size].tolist()
        return held

    def occupy(self, request: Request, blocks: list[int], num_computed: int) -> int:
        """Give a request a row. The request's tokens move into it."""
        row = self._free.pop()
        length = len(request.token_ids)
        self.state[row] = RowState.PREFILL
        self.known[row] = self.planned[row] = length
        self.computed[row] = num_computed
        self.capacity[row] = len(blocks) * self.block_size
        self.limit[row] = request.max_total
        self.prompt_len[row] = request.prompt_len
        self.handle[row] = request.handle
        self.frontend[row] = request.frontend
        self.last_token_s[row] = request.last_token_s if request.last_token_s >= 0 else np.nan
        self.tokens[row, :length] = request.token_ids
        self.blocks[row, : len(blocks)] = blocks
        self.requests[row] = request
        request.row = row
        return row

    def append_blocks(self, row: np.ndarray, blocks: list[int]) -> np.ndarray:
        """Add a block to each of these rows; returns the changes as i32[k, 4]: group, row, index, block."""
        changes = np.zeros((len(row), 4), np.int32)
        changes[:, 1] = row
        index = changes[:, 2] = self.capacity[row] // self.block_size
        changes[:, 3] = self.blocks[row, index] = blocks
        self.capacity[row] += self.block_size
        return changes

    def vacate(self, row: int) -> None:
        """Take the row back: tokens move out to the request, results in flight become stale."""
        request = self.requests[row]
        assert request is not None
        request.token_ids = self.tokens[row, : self.known[row]].copy()
        if request.first_token_s >= 0:
            request.last_token_s = float(self.last_token_s[row])
        request.row = NO_ROW
        self.requests[row] = None
        self.gen[row] += 1
        self.state[row] = FREE
        self.capacity[row] = 0
        self._free.append(row)
