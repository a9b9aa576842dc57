"""/version and /server_info."""

from __future__ import annotations

import os
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.reply import json_response
from tercet.version import __version__


class Version(msgspec.Struct):
    version: str


class ServerInfo(msgspec.Struct):
    """What the server runs and within which limits; nothing of where it runs."""

    version: str
    pid: int
    model: dict[str, Any]
    engine_limits: dict[str, Any]
    server_limits: dict[str, Any]


def routes(context: ServerContext) -> list[BaseRoute]:
    async def version(_: Request) -> Response:
        return json_response(Version(__version__))

    async def server_info(_: Request) -> Response:
        engine, settings = context.engine, context.settings
        model = msgspec.structs.asdict(engine.model_info)
        model["name"] = context.model_names[0]  # the engine's own may be a path
        model["served_names"] = context.model_names
        limits = {**msgspec.structs.asdict(settings.limits), **msgspec.structs.asdict(settings.admission)}
        info = ServerInfo(__version__, os.getpid(), model, msgspec.structs.asdict(engine.limits), limits)
        return json_response(info)

    return [Route("/version", version), Route("/server_info", server_info)]
