"""The worker's part of a request's trace: when its rows were first computed, sampled and done."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from tercet.ipc import traceparent
from tercet.ipc.messages import Admission, StepPlan, StepResult
from tercet.ipc.telemetry import Span, Spans
from tercet.ipc.traceparent import TraceParent


@dataclass(slots=True)
class _Traced:
    """A traced request in its row."""

    gen: int
    frontend: int
    parent: TraceParent
    admitted_s: float


class RowTracing:
    """Watches plans and results for rows that are traced; where none is, it looks at nothing.

    `on_plan` and `on_result` may run in different threads: each sends what it finds to have ended itself.
    """

    def __init__(self, num_rows: int, pid: int) -> None:
        self._pid = pid
        self._traced: dict[int, _Traced] = {}
        self._gen = np.full(num_rows, -1, np.int32)  # of traced rows
        self._first_s = np.zeros(num_rows)  # of each row, its owner's first result here
        self._last_s = np.zeros(num_rows)
        self._num_tokens = np.zeros(num_rows, np.int32)

    def on_plan(self, plan: StepPlan) -> list[Spans]:
        """Before a plan is run; returns the spans of rows that it releases."""
        ended = []
        if self._traced and plan.releases is not None:
            ended = self._end(plan.releases.tolist(), plan.epoch)
        for admission in plan.admissions:
            if admission.trace:
                self._begin(admission)
        return ended

    def _begin(self, admission: Admission) -> None:
        parent = traceparent.parse(admission.trace)
        if parent is not None:
            row = admission.row
            self._first_s[row] = self._last_s[row] = self._num_tokens[row] = 0
            self._gen[row] = admission.gen
            self._traced[row] = _Traced(admission.gen, admission.frontend, parent, time.time())

    def on_result(self, result: StepResult) -> list[Spans]:
        """Before a result is sent; returns the spans of rows that end with it."""
        if not self._traced or not len(result.row):
            return []
        rows = result.row[self._gen[result.row] == result.gen]
        now = time.time()
        self._first_s[rows] = np.where(self._num_tokens[rows] == 0, now, self._first_s[rows])
        self._last_s[rows] = now
        self._num_tokens[rows] += 1
        finished = result.row[(result.finish != 0) & (self._gen[result.row] == result.gen)]
        return self._end(finished.tolist(), result.epoch) if len(finished) else []

    def end_all(self, epoch: int) -> list[Spans]:
        """The spans of rows that are still there."""
        return self._end(list(self._traced), epoch)

    def _end(self, rows: list[int], epoch: int) -> list[Spans]:
        found = [(row, self._traced.pop(row, None)) for row in rows]
        return [
            Spans(
                epoch=epoch,
                process="worker",
                pid=self._pid,
                spans=self._spans(row, traced),
                frontend=traced.frontend,
            )
            for row, traced in found
            if traced is not None
        ]

    def _spans(self, row: int, traced: _Traced) -> list[Span]:
        self._gen[row] = -1
        now, num_tokens = time.time(), int(self._num_tokens[row])
        first_s, last_s = (float(self._first_s[row]), float(self._last_s[row])) if num_tokens else (now, now)
        attributes: dict[str, str | int | float] = {"gen_ai.usage.completion_tokens": num_tokens}
        whole = _span("worker", traced.parent, traced.admitted_s, last_s, attributes)
        inside = TraceParent(whole.trace_id, whole.span_id)
        spans = [whole, _span("worker.prefill", inside, traced.admitted_s, first_s, {})]
        if num_tokens > 1:
            spans.append(_span("worker.decode", inside, first_s, last_s, {}))
        return spans

    def clear(self) -> None:
        """The rows were cleared."""
        self._traced.clear()
        self._gen[:] = -1


def _span(
    name: str, parent: TraceParent, start_s: float, end_s: float, attributes: dict[str, str | int | float]
) -> Span:
    return Span(
        name=name,
        trace_id=parent.trace_id,
        span_id=parent.child().span_id,
        parent_id=parent.span_id,
        start_s=start_s,
        end_s=end_s,
        attributes=attributes,
    )
