"""/metrics and /load: of the whole engine, whichever of its API servers is asked."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.metrics import metrics_of
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.metrics import CONTENT_TYPE, render
from tercet.frontend.server.reply import json_response


class FrontendState(msgspec.Struct):
    """One frontend of the engine: its requests in progress, and where in the core they are."""

    name: str
    slot: int
    server_load: int
    running: int
    waiting: int
    serves_http: bool


class Load(msgspec.Struct):
    """Attributes: server_load: HTTP requests being answered by all API servers together, as in vLLM."""

    server_load: int
    frontends: list[FrontendState]


def routes(context: ServerContext) -> list[BaseRoute]:
    async def metrics(_: Request) -> Response:
        engine = context.engine
        stats, totals = await engine.get_telemetry()
        found = metrics_of(stats, totals, engine.limits, context.model_names[0])
        return Response(render(found), headers={"content-type": CONTENT_TYPE})

    async def load(_: Request) -> Response:
        _stats, totals = await context.engine.get_telemetry()
        frontends = [
            FrontendState(f.name, f.slot, f.num_requests, f.num_running, f.num_waiting, f.serves_http)
            for f in totals.frontends
        ]
        total: Any = sum(f.server_load for f in frontends if f.serves_http)
        return json_response(Load(total, frontends))

    return [Route("/metrics", metrics), Route("/load", load)]
