"""The ASGI application: routes, what every request passes through, and errors in OpenAI's shape."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tercet.errors import TercetError
from tercet.frontend.async_llm import AsyncLLM
from tercet.frontend.server import routes
from tercet.frontend.server.auth import ApiKeys
from tercet.frontend.server.call import GenerationEndpoint
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import ApiError, of_exception
from tercet.frontend.server.reply import error_response
from tercet.frontend.server.settings import ServerSettings

ADMIN = "admin"
"""The module of `routes` that the main application leaves out."""


def create_app(engine: AsyncLLM, settings: ServerSettings) -> Starlette:
    """The application of an engine that is started: for embedding, and for tests.

    The caller awaits `app.state.context.attach(engine)` before the first request, or lets the application's
    lifespan do so.
    """
    context = ServerContext(settings)
    return make_app(context, engine)


def make_app(context: ServerContext, engine: AsyncLLM | None = None) -> Starlette:
    """The application of a context, which may get its engine later.

    Args:
        engine: attached at the lifespan's start; None leaves it to the caller.
    """
    found: list[BaseRoute] = []
    for name in route_modules():
        if name != ADMIN:
            found += importlib.import_module(f"{routes.__name__}.{name}").routes(context)
    return _application(context, found, engine)


def make_admin_app(context: ServerContext) -> Starlette:
    """The application of the admin routes alone, which listens elsewhere."""
    module = importlib.import_module(f"{routes.__name__}.{ADMIN}")
    return _application(context, module.routes(context), None)


def route_modules() -> Iterator[str]:
    """Names of the modules of `routes`, in the order of the alphabet."""
    for module in pkgutil.iter_modules(routes.__path__):
        yield module.name


def _application(context: ServerContext, found: list[BaseRoute], engine: AsyncLLM | None) -> Starlette:
    settings = context.settings
    handlers: dict[Any, Any] = {
        ApiError: _on_error,
        TercetError: _on_error,
        HTTPException: _on_http_exception,
        Exception: _on_error,
    }

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if engine is not None:
            await context.attach(engine)
        yield

    app = Starlette(
        routes=found,
        middleware=[*_middleware(settings), _direct(found, settings.root_path)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.state.context = context
    return app


def _middleware(settings: ServerSettings) -> list[Middleware]:
    found: list[Middleware] = []
    cors = settings.cors
    if cors.allowed_origins:  # outermost: a browser's preflight carries no key
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=cors.allowed_origins,
                allow_methods=cors.allowed_methods,
                allow_headers=cors.allowed_headers,
                allow_credentials=cors.allow_credentials,
                expose_headers=["x-request-id"],
            )
        )
    if settings.api_keys:
        found.append(Middleware(ApiKeys, keys=settings.api_keys, root_path=settings.root_path))
    return found


class _Direct:
    """Hands requests to endpoints that generate past the router, which would pass on each of their chunks too."""

    def __init__(self, app: ASGIApp, endpoints: Mapping[str, GenerationEndpoint]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._endpoints.get(scope["path"]) if scope["type"] == "http" else None
        if endpoint is not None and scope["method"] == "POST":
            await endpoint(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _direct(found: Sequence[BaseRoute], root_path: str) -> Middleware:
    endpoints = {
        prefix + route.path: route.endpoint
        for route in found
        if isinstance(route, Route) and isinstance(route.endpoint, GenerationEndpoint)
        for prefix in {"", root_path.rstrip("/")}
    }
    return Middleware(_Direct, endpoints=endpoints)


async def _on_error(_: Request, error: Exception) -> Response:
    return error_response(of_exception(error))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router."""
    words = {
        404: f"there is no route {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = words.get(error.status_code, error.detail)
    response = error_response(ApiError(error.status_code, message, code="not_found"))
    response.headers.update(error.headers or {})
    if error.status_code == 405:
        response.headers["allow"] = ", ".join(_allowed(request))
    return response


def _allowed(request: Request) -> list[str]:
    """Methods of the path: the router names those of its first route alone."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return sorted(found)
