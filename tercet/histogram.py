"""Histograms that any process can keep: observing appends to a list, counting is done for many values at once.

Bounds are upper ones and inclusive, as Prometheus has them. They are vLLM's for the families that vLLM has too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Seconds.
FIRST_TOKEN_S: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
PER_TOKEN_S: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_S: Final = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
PAUSE_S: Final = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0),
)
# Counts.
STEP_TOKENS: Final = tuple(float(n) for n in (1, *(2**power for power in range(3, 15))))
CHILDREN: Final = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTIONS: Final = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)

_FOLD_AT: Final = 1024  # observed values that are kept before they are counted


def steps_of_1_2_5(most: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to `most`."""
    bounds = [float(m * 10**e) for e in range(len(str(most))) for m in (1, 2, 5) if m * 10**e <= most]
    return tuple(bounds)


class Histogram:
    """Counts of values by bucket, since the last `clear`.

    Attributes:
        bounds: f64[b], upper bounds, ascending; a last bucket without a bound is understood.
    """

    __slots__ = ("_counts", "_pending", "_sum", "bounds", "observe")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds: FloatArray = np.array(tuple(bounds), np.float64)
        self._counts = np.zeros(len(self.bounds) + 1, np.int64)
        self._sum = 0.0
        self._pending: list[float] = []
        self.observe = self._pending.append
        """Take one value, without counting it yet; `fold` must be called now and then."""

    def observe_many(self, values: npt.ArrayLike) -> None:
        """Take values at once."""
        array = np.asarray(values, np.float64)
        if array.size:
            index = np.searchsorted(self.bounds, array, side="left")
            self._counts += np.bincount(index, minlength=len(self._counts))
            self._sum += float(array.sum())

    def fold(self, *, at: int = _FOLD_AT) -> None:
        """Count what was observed, if it is as much as `at`."""
        if len(self._pending) >= at:
            self.observe_many(self._pending)
            self._pending.clear()

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """i64[b + 1], how many values fell into each bucket (not cumulated)."""
        self.fold(at=1)
        return self._counts.copy()

    @property
    def total(self) -> float:
        """Sum of the values."""
        self.fold(at=1)
        return self._sum

    def clear(self) -> None:
        self._pending.clear()
        self._counts[:] = 0
        self._sum = 0.0
