"""What a frontend counts and tells the core, once a heartbeat: latencies that its users see, and its own gauges.

The core adds it to its totals, so that every frontend can tell all. What is counted here costs an append for each
request's first token and end, and nothing for the tokens between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from tercet import histogram
from tercet.frontend.output_processor import OutputProcessor
from tercet.histogram import Histogram
from tercet.ipc.telemetry import FrontendReport, Series

_Key = tuple[str, tuple[tuple[str, str], ...]]


class Reporter:
    """Gathers one frontend's counts between two reports.

    Attributes:
        serves_http: whether this frontend is an API server.
        num_http_requests: requests that it is answering now, where it is one.
        collect: asked before each report, for what is counted elsewhere; it calls `count`.
    """

    def __init__(self, outputs: OutputProcessor) -> None:
        self.serves_http = False
        self.num_http_requests: Callable[[], int] | None = None
        self.collect: Callable[[Reporter], None] | None = None
        self._outputs = outputs
        self._pauses = Histogram(histogram.PAUSE_S)
        self._counts: Counter[_Key] = Counter()
        self._last_gauges = (0, 0, 0)
        self._is_first = (
            True  # the first report has every series, so that none is missing before it is needed
        )

    def count(self, name: str, number: int = 1, **labels: str) -> None:
        """Add to a counter, which is the sum over all frontends."""
        self._counts[name, tuple(sorted(labels.items()))] += number

    def paused(self, pauses_s: Iterable[float]) -> None:
        """Collections of garbage in this process."""
        self._pauses.observe_many(list(pauses_s))

    def take(self, epoch: int) -> FrontendReport | None:
        """Everything since the last call; None where nothing has happened."""
        if self.collect is not None:
            self.collect(self)
        series = list(self._take_series())
        gauges = self._gauges()
        if not series and gauges == self._last_gauges:
            return None
        self._last_gauges = gauges
        num_requests, num_preparing, num_unread = gauges
        return FrontendReport(
            epoch=epoch,
            num_requests=num_requests,
            num_preparing=num_preparing,
            num_unread=num_unread,
            serves_http=self.serves_http,
            series=series,
        )

    def _gauges(self) -> tuple[int, int, int]:
        requests = self._outputs.requests.values()
        num_preparing = sum(1 for r in requests if r.children and r.children[0].handle < 0)
        num_unread = sum(1 for r in requests if r.ready)
        num_requests = len(requests) if self.num_http_requests is None else self.num_http_requests()
        return num_requests, num_preparing, num_unread

    def _take_series(self) -> Iterable[Series]:
        outputs = self._outputs
        found: tuple[tuple[str, Histogram, dict[str, str]], ...] = (
            ("time_to_first_token_seconds", outputs.first_token_s, {}),
            ("e2e_request_latency_seconds", outputs.e2e_s, {}),
            ("gc_pause_seconds", self._pauses, {"process": "frontend"}),
        )
        for name, values, labels in found:
            counts = values.counts
            if self._is_first or counts.any():
                yield Series(
                    name=name, bounds=values.bounds, counts=counts, total=values.total, labels=labels
                )
                values.clear()
        for (name, pairs), number in self._counts.items():
            yield Series(
                name=name, bounds=np.zeros(0), counts=np.array([number], np.int64), labels=dict(pairs)
            )
        self._counts.clear()
        self._is_first = False
