"""/: the live page, its files and its figures."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.page import FILES, SECURITY_HEADERS, FigureCache, read_file
from tercet.frontend.server.reply import json_response


def routes(context: ServerContext) -> list[BaseRoute]:
    cache = FigureCache()

    async def data(_: Request) -> Response:
        response = json_response(await cache.get(context.engine, context.model_names[0]))
        response.headers["cache-control"] = "no-store"
        return response

    found: list[BaseRoute] = [Route("/page/data", data), _file("/", "index.html")]
    return [*found, *(_file(f"/page/{name}", name) for name in FILES if name != "index.html")]


def _file(path: str, name: str) -> Route:
    body = read_file(name)  # once, when the server starts

    async def send(_: Request) -> Response:
        return Response(body, headers={**SECURITY_HEADERS, "content-type": FILES[name]})

    return Route(path, send, name=name)
