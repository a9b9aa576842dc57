"""How long Python's garbage collector stops this process: a hot loop's latency that no profile of it shows."""

from __future__ import annotations

import gc
import time
from typing import Any, Final

_MOST: Final = 4096  # pauses kept for whoever asks; a process that nobody asks must not grow


class GcPauses:
    """Measures each collection from `install` on. For processes of our own: it is process-wide."""

    def __init__(self) -> None:
        self._started_s = 0.0
        self._pauses: list[float] = []

    def install(self) -> None:
        gc.callbacks.append(self._on_gc)

    def take(self) -> list[float]:
        """Pauses since the last call, seconds each."""
        if not self._pauses:
            return []
        # In place: a collection may append at any moment, and what it appends meanwhile stays.
        taken = self._pauses[:]
        del self._pauses[: len(taken)]
        return taken

    def _on_gc(self, phase: str, _info: dict[str, Any]) -> None:
        if phase == "start":
            self._started_s = time.perf_counter()
        elif len(self._pauses) < _MOST:
            self._pauses.append(time.perf_counter() - self._started_s)
