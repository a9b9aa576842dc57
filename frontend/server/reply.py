"""Small responses, for routes that do not generate."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from tercet.frontend.server.errors import ApiError
from tercet.frontend.server.sse import encode


def json_response(data: Any, status: int = 200) -> Response:
    """Any msgspec type as JSON."""
    return Response(encode(data), status, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.json(), error.status, headers, media_type="application/json")
