"""Totals of what frontends report. They outlive the frontend, so that counters never fall back."""

from __future__ import annotations

import re
from typing import Final

import numpy as np

from tercet.ipc.telemetry import Series

MAX_SERIES: Final = 256
_MAX_BOUNDS: Final = 64
_MAX_LABELS: Final = 4
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9_./-]{1,64}")

_Key = tuple[str, tuple[tuple[str, str], ...]]


class SeriesError(Exception):
    """A report that cannot be added; the message says why."""


class Totals:
    """Sums of series by name and labels. Trusts no frontend: names, sizes and numbers are checked."""

    def __init__(self) -> None:
        self._sums: dict[_Key, Series] = {}

    def add(self, series: Series) -> None:
        """Add what a frontend has counted since its last report.

        Raises:
            SeriesError: it is malformed, contradicts what others report, or is one name too many.
        """
        _check(series)
        key = series.name, tuple(sorted(series.labels.items()))
        known = self._sums.get(key)
        if known is None:
            if len(self._sums) >= MAX_SERIES:
                raise SeriesError(f"more than {MAX_SERIES} series")
            bounds, counts = series.bounds.copy(), series.counts.copy()
            self._sums[key] = Series(
                name=series.name, bounds=bounds, counts=counts, total=series.total, labels=series.labels
            )
            return
        if not np.array_equal(known.bounds, series.bounds):
            raise SeriesError(f"{series.name}: other bounds than before")
        self._sums[key] = Series(
            name=series.name,
            bounds=known.bounds,
            counts=known.counts + series.counts,
            total=known.total + series.total,
            labels=known.labels,
        )

    def series(self) -> list[Series]:
        return list(self._sums.values())


def _check(series: Series) -> None:
    bounds, counts = series.bounds, series.counts
    labels = series.labels.items()
    named = _NAME.fullmatch(series.name) and all(
        _NAME.fullmatch(name) and _LABEL_VALUE.fullmatch(value) for name, value in labels
    )
    if not named or len(series.labels) > _MAX_LABELS:
        raise SeriesError("names that are no metric's")
    if bounds.dtype != np.float64 or bounds.ndim != 1 or len(bounds) > _MAX_BOUNDS:
        raise SeriesError(f"{series.name}: bounds must be at most {_MAX_BOUNDS} float64")
    if not np.isfinite(bounds).all() or (np.diff(bounds) <= 0).any():
        raise SeriesError(f"{series.name}: bounds must ascend")
    if counts.dtype != np.int64 or counts.shape != (len(bounds) + 1,):
        raise SeriesError(f"{series.name}: one count for each bucket, int64")
    if (counts < 0).any() or (counts > 2**40).any() or not np.isfinite(series.total):
        raise SeriesError(f"{series.name}: counts out of range")
