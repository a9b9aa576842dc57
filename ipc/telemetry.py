"""The part of the protocol that carries figures and traces; `messages.py` has the rest and the inboxes."""

# ruff: noqa: RUF012  (msgspec copies a struct's mutable defaults; ruff cannot see that these are structs)

from __future__ import annotations

from tercet.ipc.message_base import Column, Message, Part


class Series(Part, frozen=True, kw_only=True):
    """A counter or a histogram. Names are without prefix, as in docs/observability.md.

    A counter has no bounds, and one count. A histogram's counts are per bucket, not cumulated.
    """

    name: str
    bounds: Column  # f64[b], ascending upper bounds, inclusive; b = 0 for a counter
    counts: Column  # i64[b + 1]
    total: float = 0.0  # sum of the observed values; 0 for a counter
    labels: dict[str, str] = {}


class FrontendReport(Message, frozen=True, kw_only=True):
    """frontend -> core, at most once a heartbeat: what it counted since its last report, and its gauges now.

    Not answered. The core adds the series to its totals, which outlive the frontend.
    """

    epoch: int
    num_requests: int  # in progress, those not sent to the core yet included
    num_preparing: int = 0  # of them, not sent yet: checked and tokenized
    num_unread: int = 0  # of them, with outputs that their consumer has not taken
    serves_http: bool = False
    series: list[Series] = []


class FrontendLoad(Part, frozen=True, kw_only=True):
    """One attached frontend: the core's figures, and those of its last FrontendReport."""

    slot: int
    name: str
    num_running: int
    num_waiting: int
    num_requests: int = 0  # as reported
    num_preparing: int = 0  # as reported
    num_unread: int = 0  # as reported
    serves_http: bool = False  # as reported
    backlog: int = 0  # messages that it has yet to read


class StepTimes(Part, frozen=True, kw_only=True):
    """Recent steps, one entry each."""

    step: Column  # i64[m]
    time_s: Column  # f64[m], time.time() at which the result was applied
    schedule_us: Column  # f32[m], core: deciding on the plan and sending it
    launch_us: Column  # f32[m], worker: from the plan's arrival to the launch
    wait_us: Column  # f32[m], worker: from the launch to the result
    output_us: Column  # f32[m], core: applying the result and sending what came of it
    num_tokens: Column  # i32[m], computed in the step
    num_decodes: Column  # i32[m], of them, one each for rows that decode


class Metrics(Part, frozen=True, kw_only=True):
    """Totals since the core started, and who is attached. `queues` are depths by the name of the hop."""

    series: list[Series]
    frontends: list[FrontendLoad]
    queues: dict[str, int]
    steps: StepTimes | None = None


class Span(Part, frozen=True, kw_only=True):
    """A stretch of time that a process spent on a traced request, in OpenTelemetry's terms."""

    name: str
    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16 hexadecimal digits
    parent_id: str  # 16 hexadecimal digits
    start_s: float  # time.time()
    end_s: float
    attributes: dict[str, str | int | float] = {}


class Spans(Message, frozen=True, kw_only=True):
    """worker -> core -> frontend: of requests that came with `trace`. The frontend exports them."""

    epoch: int
    process: str  # 'core' or 'worker'
    pid: int
    spans: list[Span]
    frontend: int = 0  # worker -> core: whom they are for, from the Admission
