"""Routes that change the engine for everyone. They are on a socket of their own: see `serving.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import bad_request
from tercet.frontend.server.reply import json_response

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def routes(context: ServerContext) -> list[BaseRoute]:
    async def pause(request: Request) -> Response:
        mode: Any = request.query_params.get("mode", "abort")
        clear_cache = _flag(request, "clear_cache", True)
        await context.engine.pause_generation(mode=mode, clear_cache=clear_cache)
        return json_response({"status": "paused"})

    async def resume(_: Request) -> Response:
        await context.engine.resume_generation()
        return json_response({"status": "running"})

    async def is_paused(_: Request) -> Response:
        return json_response({"is_paused": await context.engine.is_paused()})

    async def reset_prefix_cache(_: Request) -> Response:
        return json_response({"success": await context.engine.reset_prefix_cache()})

    async def start_profile(request: Request) -> Response:
        await context.engine.start_profile(request.query_params.get("prefix"))
        return json_response({"status": "profiling"})

    async def stop_profile(_: Request) -> Response:
        await context.engine.stop_profile()
        return json_response({"status": "stopped"})

    posts: list[Callable[[Request], Awaitable[Response]]] = [
        pause,
        resume,
        reset_prefix_cache,
        start_profile,
        stop_profile,
    ]
    found: list[BaseRoute] = [Route(f"/{post.__name__}", post, methods=["POST"]) for post in posts]
    return [*found, Route("/is_paused", is_paused)]


def _flag(request: Request, name: str, default: bool) -> bool:
    text = request.query_params.get(name)
    if text is None:
        return default
    if text.lower() not in _FLAGS:
        raise bad_request(name, f"{name}: must be true or false; got {text[:60]!r}")
    return _FLAGS[text.lower()]
