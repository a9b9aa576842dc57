"""What heartbeats tell of an engine: how long it has been silent, and how long it has got no further."""

from __future__ import annotations

import time

from tercet.ipc.messages import Stats


class Pulse:
    """Fed by the connection to a core; asked by health checks, which so cost the engine nothing.

    Attributes:
        stats: the last gauges and counters that came by themselves; None before the first.
        silent_s: seconds without any message from the core, in whole heartbeat intervals.
    """

    __slots__ = ("_moved_s", "silent_s", "stats")

    def __init__(self) -> None:
        self.stats: Stats | None = None
        self.silent_s = 0.0
        self._moved_s = time.monotonic()

    def observe(self, stats: Stats) -> None:
        """Take figures that have come."""
        last, self.stats = self.stats, stats
        if last is None or stats.step != last.step or not stats.num_running:
            self._moved_s = time.monotonic()

    @property
    def stalled_s(self) -> float:
        """Seconds for which requests have run without a step ending; about 0 while nothing runs."""
        if self.stats is None or not self.stats.num_running:
            return 0.0
        return time.monotonic() - self._moved_s
