"""The switch between the fastest kernels and those whose results do not depend on a row's neighbours.

With it on, a token's numbers are the same in any batch, however its prompt is cut into chunks: kernels then keep
one order of reduction for all sizes. The worker sets it once, before the first step (`--batch-invariant`).
"""

from __future__ import annotations

_is_on = False


def set_batch_invariant(on: bool) -> None:
    """Choose for all operations of this process. Set before kernels run or are captured."""
    global _is_on
    _is_on = on


def is_batch_invariant() -> bool:
    """Whether results must not depend on the batch."""
    return _is_on
