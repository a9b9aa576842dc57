"""All that the core can tell of itself and its frontends: the answer to GetMetrics, and the spans of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from tercet.core_proc import tracing
from tercet.core_proc.frontends import Frontend
from tercet.core_proc.request import Request
from tercet.core_proc.rows import FREE
from tercet.core_proc.scheduler import Scheduler
from tercet.core_proc.telemetry import PauseLog, RequestLog, StepLog, counter
from tercet.core_proc.totals import Totals
from tercet.gc_pauses import GcPauses
from tercet.ipc.messages import Finish, StepResult
from tercet.ipc.telemetry import FrontendLoad, FrontendReport, Metrics, Spans

_REFUSALS = ("invalid", "queue_full", "unsupported")


class CoreMetrics:
    """Everything that is counted beside the scheduler's own counters.

    Attributes:
        num_refused: requests that the core did not take.
        spans: of traced requests that have ended, with the slot of their frontend; whoever sends them clears it.
    """

    def __init__(self, scheduler: Scheduler, pauses: GcPauses) -> None:
        self.num_refused = 0
        self.spans: list[tuple[int, Spans]] = []
        self._scheduler = scheduler
        self._pauses = pauses
        self._steps = StepLog()
        self._requests = RequestLog(scheduler.config.max_model_len)
        self._pause_log = PauseLog()
        self._totals = Totals()
        self._refusals = Counter(dict.fromkeys(_REFUSALS, 0))
        scheduler.on_end = self._on_end

    # ---- what happens

    def planned(self, schedule_s: float) -> None:
        """The scheduler's last plan was sent."""
        scheduler = self._scheduler
        self._steps.planned(scheduler.step, schedule_s, scheduler.planned_tokens, scheduler.planned_decodes)

    def ended(self, result: StepResult, output_s: float) -> None:
        """A step's result was applied and its outputs were sent."""
        self._steps.ended(result, output_s)
        if result.gc_us:
            self._pause_log.observe("worker", [result.gc_us * 1e-6])

    def refused(self, code: str) -> None:
        self.num_refused += 1
        self._refusals[code] += 1

    def reported(self, frontend: Frontend, report: FrontendReport) -> None:
        """Take what a frontend has counted.

        Raises:
            SeriesError: some of it cannot be added.
        """
        frontend.report = report
        for series in report.series:
            self._totals.add(series)

    def _on_end(self, request: Request, finish: Finish) -> None:
        self._requests.ended(request, finish)
        if request.trace:
            spans = tracing.spans_of(request, finish, self._scheduler.epoch)
            self.spans.append((request.frontend, spans))

    # ---- what is told

    def metrics(self, frontends: Iterable[Frontend], num_results: int, steps_after: int | None) -> Metrics:
        """Everything as of now.

        Args:
            num_results: of the worker, not applied yet.
            steps_after: see GetMetrics.
        """
        self._pause_log.observe("core", self._pauses.take())
        loads = self._loads(frontends)
        return Metrics(
            series=[
                *self._requests.series(),
                *self._steps.series(),
                *self._pause_log.series(),
                self._scheduler.gaps.series(),
                counter("corrupted_requests", self._scheduler.num_corrupted),
                *(counter("admission_rejections", n, reason=code) for code, n in self._refusals.items()),
                *self._totals.series(),
            ],
            frontends=loads,
            queues={
                "frontend_prepare": sum(load.num_preparing for load in loads),
                "core_deferred": len(self._scheduler.draining),
                "core_waiting": len(self._scheduler.waiting),
                "core_worker": self._scheduler.num_in_flight,
                "worker_core": num_results,
                "core_frontend": sum(load.backlog for load in loads),
                "frontend_unread": sum(load.num_unread for load in loads),
            },
            steps=None if steps_after is None else self._steps.times(steps_after),
        )

    def _loads(self, frontends: Iterable[Frontend]) -> list[FrontendLoad]:
        rows, unfinished = self._scheduler.rows, self._scheduler.unfinished
        owners, counts = np.unique(rows.frontend[rows.state != FREE], return_counts=True)
        running = dict(zip(owners.tolist(), counts.tolist(), strict=True))
        return [
            _load(frontend, running.get(frontend.slot, 0), unfinished.get(frontend.slot, 0))
            for frontend in frontends
        ]


def _load(frontend: Frontend, num_running: int, num_unfinished: int) -> FrontendLoad:
    report = frontend.report
    backlog = 0 if frontend.backlog is None else len(frontend.backlog)
    return FrontendLoad(
        slot=frontend.slot,
        name=frontend.name,
        num_running=num_running,
        num_waiting=num_unfinished - num_running,
        num_requests=report.num_requests if report is not None else num_unfinished,
        num_preparing=report.num_preparing if report is not None else 0,
        num_unread=report.num_unread if report is not None else 0,
        serves_http=report is not None and report.serves_http,
        backlog=backlog,
    )
