"""Comparing the core's tables with the worker's: a fault in either shows at the step where it happens."""

from __future__ import annotations

import numpy as np

from tercet.ipc.messages import Audit


def check_audit(audit: Audit, gen: np.ndarray, state: np.ndarray, block_table: np.ndarray) -> None:
    """Compare, after the plan's changes were applied.

    Args:
        gen, state: [num_rows] of the worker.
        block_table: [num_rows, max_blocks] of the worker, group 0.

    Raises:
        AssertionError: names the first row that differs.
    """
    for i, row in enumerate(audit.row.tolist()):
        blocks = audit.block[audit.block_offset[i] : audit.block_offset[i + 1]]
        assert gen[row] == audit.gen[i], f"row {row}: generation {gen[row]}, the core has {audit.gen[i]}"
        assert state[row] == audit.state[i], f"row {row}: state {state[row]}, the core has {audit.state[i]}"
        mine = block_table[row, : len(blocks)]
        assert np.array_equal(mine, blocks), f"row {row}: blocks {mine}, the core has {blocks}"
