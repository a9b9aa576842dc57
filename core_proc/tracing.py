"""The core's part of a request's trace: how long it waited, was prefilled and decoded."""

from __future__ import annotations

import os
import time

from tercet.core_proc.request import Request
from tercet.ipc import traceparent
from tercet.ipc.messages import Finish
from tercet.ipc.telemetry import Span, Spans


def begin(request: Request) -> None:
    """Give a request that came with a traceparent a span of the core's own, which the worker's hang on."""
    parent = traceparent.parse(request.prompt.message.trace)
    if parent is not None:
        request.trace = str(parent.child())


def spans_of(request: Request, finish: Finish, epoch: int) -> Spans:
    """The spans of a traced request that has ended."""
    own, parent = traceparent.parse(request.trace), traceparent.parse(request.prompt.message.trace)
    assert own is not None and parent is not None
    now = time.monotonic()
    wall = time.time() - now  # the request's times are monotonic ones
    whole = Span(
        name="core",
        trace_id=own.trace_id,
        span_id=own.span_id,
        parent_id=parent.span_id,
        start_s=wall + request.arrival_s,
        end_s=wall + now,
        attributes={
            "tercet.finish": finish.name.lower(),
            "tercet.num_preemptions": request.num_preemptions,
            "tercet.num_cached_tokens": max(request.num_cached_tokens, 0),
            "gen_ai.usage.prompt_tokens": request.prompt_len,
            "gen_ai.usage.completion_tokens": len(request.token_ids) - request.prompt_len,
        },
    )
    phases = [
        Span(
            name=name,
            trace_id=own.trace_id,
            span_id=own.child().span_id,
            parent_id=own.span_id,
            start_s=wall + start,
            end_s=wall + end,
        )
        for name, start, end in _phases(request, now)
    ]
    return Spans(epoch=epoch, process="core", pid=os.getpid(), spans=[whole, *phases])


def _phases(request: Request, now: float) -> list[tuple[str, float, float]]:
    """Names, starts and ends; a request that ended early has fewer."""
    started, first = request.started_s, request.first_token_s
    if started < 0:
        return [("queue", request.arrival_s, now)]
    queue = ("queue", request.arrival_s, started)
    if first < 0:
        return [queue, ("prefill", started, now)]
    return [queue, ("prefill", started, first), ("decode", first, request.last_token_s)]
