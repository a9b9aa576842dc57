"""Whether the server lives, may take traffic, and gets on: three questions, none of which asks the engine."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.reply import json_response


class Health(msgspec.Struct):
    """Attributes: status: 'ok', or what is wrong in one word."""

    status: str


class ProgressReport(msgspec.Struct):
    """
    Attributes:
        phase: of the engine's start; 'running' after it.
        done, total: of the phase, 0 of 0 where it has no measure.
        heartbeat_age_s: since the engine's last sign of life, in whole intervals.
        step: number of the engine's last step.
        step_age_s: since a step ended, while requests run; 0 otherwise.
        num_running, num_waiting: requests of all frontends.
    """

    phase: str
    done: int = 0
    total: int = 0
    heartbeat_age_s: float = 0.0
    step: int = 0
    step_age_s: float = 0.0
    num_running: int = 0
    num_waiting: int = 0


def routes(context: ServerContext) -> list[BaseRoute]:
    async def health(_: Request) -> Response:
        alive = context.alive
        return json_response(Health("ok" if alive else "dead"), 200 if alive else 503)

    async def ready(_: Request) -> Response:
        problem = context.problem()
        if problem is None:
            return json_response(Health("ok"))
        response = json_response(Health(problem), 503)
        response.headers["retry-after"] = "1"
        return response

    async def progress(_: Request) -> Response:
        return json_response(_report(context))

    async def ping(_: Request) -> Response:
        return Response(status_code=200 if context.alive else 503)

    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/progress", progress),
        Route("/ping", ping, methods=["GET", "POST"]),
    ]


def _report(context: ServerContext) -> ProgressReport:
    if context.failure is not None:
        return ProgressReport("failed")
    if not context.attached:
        start = context.start_progress()
        return ProgressReport(start.phase, start.done, start.total)
    pulse = context.engine.pulse
    figures: dict[str, Any] = {}
    if pulse.stats is not None:
        names = ("step", "num_running", "num_waiting")
        figures = {name: getattr(pulse.stats, name) for name in names}
    return ProgressReport(
        "draining" if context.draining else "running",
        heartbeat_age_s=pulse.silent_s,
        step_age_s=round(pulse.stalled_s, 3),
        **figures,
    )
