"""Errors as OpenAI's clients know them: a status and {"error": {message, type, param, code}}.

Texts that reach clients hold no paths, addresses or representations of objects: what the engine raises for its
user is passed on, anything else is logged and answered with a plain sentence.
"""

from __future__ import annotations

from typing import Final

import msgspec

from tercet.errors import (
    ConfigError,
    EngineError,
    QueueFullError,
    RequestError,
    TercetError,
    ValidationError,
)
from tercet.log import get_logger

logger = get_logger(__name__)

_OVERLOAD_RETRY_S: Final = 1
_OUTAGE_RETRY_S: Final = 5


class ErrorBody(msgspec.Struct, gc=False):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct, gc=False):
    error: ErrorBody


class ApiError(Exception):
    """What a request is answered with in place of what it asked for.

    Args:
        status: of HTTP.
        retry_after_s: for the header Retry-After; None leaves it out.
        close: whether the connection is to be closed, as when its rest has not been read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, kind, param, code)
        self.retry_after_s = retry_after_s
        self.close = close

    def json(self) -> bytes:
        return msgspec.json.encode(ErrorResponse(self.body))

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to the error, beside those of every response."""
        headers = []
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.close:
            headers.append((b"connection", b"close"))
        return headers


def bad_request(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """400: the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """400: the request asks for what the engine does not do."""
    return ApiError(400, f"{param}: {why}", param=param, code="unsupported_parameter")


def overloaded(message: str) -> ApiError:
    """429: try again soon."""
    return ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="server_overloaded",
        retry_after_s=_OVERLOAD_RETRY_S,
    )


def unavailable(message: str, code: str) -> ApiError:
    """503: not now."""
    return ApiError(
        503, message, kind="service_unavailable", code=code, retry_after_s=_OUTAGE_RETRY_S, close=True
    )


def internal() -> ApiError:
    return ApiError(500, "the server had an error while processing the request", kind="server_error")


# Names under which the engine checks what the request calls otherwise.
_FIELDS_OF_CHAT: Final = {"prompt": "messages", "prompt_token_ids": "messages"}
_FIELDS_OF_COMPLETION: Final = {"prompt_token_ids": "prompt"}


def of_exception(error: BaseException, *, chat: bool = False) -> ApiError:
    """The answer to whatever was raised while a request was served.

    Args:
        chat: whether the request holds messages, not a prompt.
    """
    match error:
        case ApiError():
            return error
        case ValidationError() | ConfigError():
            names = _FIELDS_OF_CHAT if chat else _FIELDS_OF_COMPLETION
            field = names.get(error.field, error.field)
            return bad_request(field, f"{field}: {error.problem}")
        case QueueFullError():
            return overloaded(str(error))
        case RequestError():
            return ApiError(500, error.problem, kind="server_error", code="request_failed")
        case EngineError():
            return unavailable("the engine is not available", "engine_unavailable")
        case TercetError():
            return ApiError(500, str(error), kind="server_error")
        case _:
            logger.error("a request failed", exc_info=error)
            return internal()
