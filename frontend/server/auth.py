"""API keys: with any set, every route asks for one but those that a load balancer needs."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

from starlette.datastructures import Headers

from tercet.frontend.server.errors import ApiError

OPEN_PATHS: Final = frozenset({"/health", "/ready", "/version"})

_App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class ApiKeys:
    """ASGI middleware.

    Digests are compared, all of them and each in constant time, so that the time of a refusal says nothing of
    how much of a key was right.

    Args:
        keys: any of them will do.
        root_path: put before every path by a proxy.
    """

    def __init__(self, app: _App, keys: Sequence[str], root_path: str = "") -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = frozenset(root_path.rstrip("/") + path for path in OPEN_PATHS) | OPEN_PATHS

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open and not self._has_key(scope):
            await _refuse(send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: MutableMapping[str, Any]) -> bool:
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given.encode("latin-1"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _refuse(send: Any) -> None:
    error = ApiError(
        401,
        "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
        kind="authentication_error",
        code="invalid_api_key",
        close=True,
    )
    body = error.json()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *error.headers(),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
