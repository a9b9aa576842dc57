"""/openapi.json"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.openapi import make_document
from tercet.frontend.server.sse import encode


def routes(context: ServerContext) -> list[BaseRoute]:
    body = encode(make_document(context.settings))  # once: it depends on the settings alone

    async def document(_: Request) -> Response:
        return Response(body, media_type="application/json")

    return [Route("/openapi.json", document)]
