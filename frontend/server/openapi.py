"""The OpenAPI document of the server, made from the types that bodies are decoded to and encoded from.

`OPERATIONS` is the table of routes. Requests lose the parameters that are known but refused, and get the ranges
by which they are checked; responses are closed, for each field of theirs is always written.

Source: OpenAPI 3.1, https://spec.openapis.org/oas/v3.1.1; schemas are JSON Schema 2020-12 by `msgspec.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from tercet.frontend.server.auth import OPEN_PATHS
from tercet.frontend.server.errors import ErrorResponse
from tercet.frontend.server.messages_api import REFUSED_MESSAGES, CountRequest, MessagesRequest
from tercet.frontend.server.metrics import CONTENT_TYPE
from tercet.frontend.server.openapi_limits import (
    LIMITS,
    LIMITS_OF,
    REQUEST_ID,
    REQUIRED,
    bounded,
    without_null,
)
from tercet.frontend.server.parameters import REFUSED, RefusalTable
from tercet.frontend.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tercet.frontend.server.response_shapes import (
    DeletedResponse,
    MessageBody,
    MessagesError,
    ResponseBody,
    TokenCount,
)
from tercet.frontend.server.responses import (
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    Model,
    ModelList,
    TokenizeResponse,
)
from tercet.frontend.server.responses_api import REFUSED_RESPONSES, ResponsesRequest
from tercet.frontend.server.routes.health import Health, ProgressReport
from tercet.frontend.server.routes.info import ServerInfo, Version
from tercet.frontend.server.routes.metrics import Load
from tercet.frontend.server.settings import ServerSettings
from tercet.version import __version__

_REF: Final = "#/components/schemas/{name}"

# Said of a connection, before any route is looked at, hence in OpenAI's shape whatever the route.
_OF_CONNECTION: Final = (401, 408, 413, 414, 431)
_OF_EITHER: Final = (400, 429)

_EVENT: Final = {
    "type": "object",
    "description": "One event of the stream: `data` is JSON, or [DONE] at the end of OpenAI's streams.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}

_MEANINGS: Final[Mapping[int, str]] = {
    400: "The request is wrong, or asks for what is not supported; `param` names the parameter.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or response.",
    408: "The request came too slowly.",
    413: "The body is too long.",
    414: "The URL is too long.",
    429: "Too much work is unfinished.",
    431: "The headers are too long, or too many.",
    500: "This request failed.",
    503: "Not now: the engine starts or is gone, or the server is shutting down.",
    504: "The request's time was up.",
}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one route.

    Attributes:
        request: type of its body; None where it takes none.
        refused: parameters of it that are known by name only.
        response: type of the body of a 200, `bytes` for text in `content_type`; None where it is empty.
        generates: whether it passes through `GenerationEndpoint`, with that one's headers.
        streams: whether a 200 may be server-sent events instead.
        not_found: whether it may answer 404.
        asks_engine: whether it answers 503 while there is no engine.
        unavailable: type of a 503's body in place of the error's; `bytes` for none.
        error: type of errors that the route itself makes.
    """

    method: str
    path: str
    summary: str
    request: type | None = None
    refused: RefusalTable = {}
    response: Any = None
    content_type: str = "application/json"
    generates: bool = False
    streams: bool = False
    not_found: bool = False
    asks_engine: bool = True
    unavailable: Any = None
    error: Any = ErrorResponse

    @property
    def errors(self) -> list[int]:
        """Every status but 200 that it may have."""
        found = {400, 401, 408, 413, 414, 429, 431, 500}
        if self.path in OPEN_PATHS:
            found.discard(401)
        if self.not_found or self.generates or self.request is not None:
            found.add(404)
        if self.asks_engine or self.unavailable is not None:
            found.add(503)
        if self.generates:
            found.add(504)
        return sorted(found)


def _get(path: str, summary: str, response: Any, **fields: Any) -> Operation:
    return Operation(method="get", path=path, summary=summary, response=response, **fields)


def _post(path: str, summary: str, request: type, response: Any, **fields: Any) -> Operation:
    return Operation(method="post", path=path, summary=summary, request=request, response=response, **fields)


def _generate(path: str, summary: str, request: type, response: Any, **fields: Any) -> Operation:
    return _post(path, summary, request, response, generates=True, **fields)


_RESPONSE: Final = "/v1/responses/{response_id}"
_SHAPE: Final[dict[str, Any]] = {"error": MessagesError, "refused": REFUSED_MESSAGES}
_STILL: Final[dict[str, Any]] = {"asks_engine": False}

OPERATIONS: Final = (
    _generate(
        "/v1/chat/completions", "Answer a chat", ChatRequest, ChatCompletion, refused=REFUSED, streams=True
    ),
    _generate(
        "/v1/completions", "Go on with prompts", CompletionRequest, Completion, refused=REFUSED, streams=True
    ),
    _generate(
        "/v1/responses",
        "Make a response",
        ResponsesRequest,
        ResponseBody,
        refused=REFUSED_RESPONSES,
        streams=True,
    ),
    _get(_RESPONSE, "Retrieve a response", ResponseBody, not_found=True, **_STILL),
    Operation(
        method="delete",
        path=_RESPONSE,
        summary="Delete a response",
        response=DeletedResponse,
        not_found=True,
        asks_engine=False,
    ),
    Operation(
        method="post",
        path=f"{_RESPONSE}/cancel",
        summary="Stop a response that is computed in the background",
        response=ResponseBody,
        not_found=True,
        asks_engine=False,
    ),
    _generate("/v1/messages", "Answer a chat", MessagesRequest, MessageBody, streams=True, **_SHAPE),
    _generate("/v1/messages/count_tokens", "Count a chat's tokens", CountRequest, TokenCount, **_SHAPE),
    _get("/v1/models", "List the model's names", ModelList),
    _get("/v1/models/{name}", "Describe the model", Model, not_found=True),
    _post("/tokenize", "Text to tokens", TokenizeRequest, TokenizeResponse),
    _post("/detokenize", "Tokens to text", DetokenizeRequest, DetokenizeResponse),
    _get("/health", "Whether the process does its work", Health, unavailable=Health, **_STILL),
    _get("/ready", "Whether requests should be sent here", Health, unavailable=Health, **_STILL),
    _get("/ping", "Health without a body", None, unavailable=bytes, **_STILL),
    Operation(
        method="post",
        path="/ping",
        summary="Health without a body",
        unavailable=bytes,
        asks_engine=False,
    ),
    _get("/progress", "How far the start is", ProgressReport, **_STILL),
    _get("/version", "The server's version", Version, **_STILL),
    _get("/server_info", "Model and limits", ServerInfo),
    _get("/metrics", "Metrics for Prometheus", bytes, content_type=CONTENT_TYPE),
    _get("/load", "Requests in progress, by frontend", Load),
    _get("/openapi.json", "This document", dict[str, Any], **_STILL),
)
"""Every route but the live page's files."""


def make_document(settings: ServerSettings) -> dict[str, Any]:
    """The document of a server with these settings; of JSON types."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, settings)
    components: dict[str, Any] = {"schemas": {**_requests(settings), **_responses()}}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Tercet", "version": __version__},
        "servers": [{"url": settings.root_path.rstrip("/") or "/"}],
        "paths": paths,
        "components": components,
    }
    if settings.api_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
    return document


# ---- operations


def _operation(operation: Operation, settings: ServerSettings) -> dict[str, Any]:
    statuses = [status for status in operation.errors if status != 401 or settings.api_keys]
    found: dict[str, Any] = {
        "operationId": _operation_id(operation),
        "summary": operation.summary,
        "responses": {"200": _success(operation)}
        | {str(status): _failure(operation, status) for status in statuses},
    }
    if parameters := _parameters(operation):
        found["parameters"] = parameters
    if operation.request is not None:
        schema = _reference(operation.request)
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if settings.api_keys and operation.path in OPEN_PATHS:
        found["security"] = []
    return found


def _operation_id(operation: Operation) -> str:
    words = operation.path.translate(str.maketrans("/._{}", "     ")).split()
    return "_".join([operation.method, *words])


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if "{" in operation.path:
        name = operation.path.split("{")[1].split("}")[0]
        schema = {"type": "string", "minLength": 1}
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if operation.generates:
        timeout = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9}
        found.append({"name": "X-Request-Id", "in": "header", "schema": REQUEST_ID})
        found.append({"name": "X-Request-Timeout", "in": "header", "schema": timeout})
    return found


def _success(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = {"description": operation.summary}
    if operation.response is not None:
        found["content"] = {operation.content_type: {"schema": _reference(operation.response)}}
    if operation.streams:
        found["content"]["text/event-stream"] = {"schema": _EVENT}
    if operation.generates:
        found["headers"] = {"X-Request-Id": {"required": True, "schema": REQUEST_ID}}
    return found


def _failure(operation: Operation, status: int) -> dict[str, Any]:
    found: dict[str, Any] = {"description": _MEANINGS[status]}
    body = _error_schema(operation, status)
    if body is not None:
        found["content"] = {"application/json": {"schema": body}}
    if status == 503 and operation.unavailable in (None, Health) and operation.path != "/health":
        found["headers"] = {"Retry-After": {"required": True, "schema": {"type": "integer", "minimum": 1}}}
    return found


def _error_schema(operation: Operation, status: int) -> dict[str, Any] | None:
    if status == 503 and operation.unavailable is not None:
        return None if operation.unavailable is bytes else _reference(operation.unavailable)
    if operation.error is ErrorResponse or status in _OF_CONNECTION:
        return _reference(ErrorResponse)
    if status in _OF_EITHER:
        return {"anyOf": [_reference(operation.error), _reference(ErrorResponse)]}
    return _reference(operation.error)


def _reference(kind: Any) -> dict[str, Any]:
    if kind is bytes:
        return {"type": "string"}
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


# ---- schemas


def _components(kinds: Iterable[Any]) -> dict[str, Any]:
    distinct = list(dict.fromkeys(kind for kind in kinds if kind not in (None, bytes)))
    return msgspec.json.schema_components(distinct, ref_template=_REF)[1]


def _requests(settings: ServerSettings) -> dict[str, Any]:
    schemas = _components(operation.request for operation in OPERATIONS)
    unavailable = _switched_off(settings)
    for operation in OPERATIONS:
        if operation.request is not None:
            properties = schemas[operation.request.__name__]["properties"]
            for name in properties.keys() & {*operation.refused, *unavailable}:
                del properties[name]
    for name, schema in schemas.items():
        _bound(name, schema)
    schemas["StreamOptions"]["properties"]["include_obfuscation"] = {"enum": [False, None], "default": None}
    return schemas


def _switched_off(settings: ServerSettings) -> set[str]:
    """Parameters that this server refuses for want of an option."""
    found: set[str] = set()
    if not settings.trust_request_chat_template:
        found.add("chat_template")
    if not settings.enable_responses_store:
        found |= {"background", "previous_response_id", "store"}
    return found


def _bound(name: str, schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    for field, limits in LIMITS.items():
        if field in properties:
            properties[field] = bounded(properties[field], LIMITS_OF.get((name, field), limits))
    for (owner, field), limits in LIMITS_OF.items():
        if owner == name:
            properties[field] = bounded(properties[field], limits)
    if name in REQUIRED:
        field = REQUIRED[name]
        properties[field] = without_null(properties[field])
        schema["required"] = [*schema["required"], field]


def _responses() -> dict[str, Any]:
    kinds = [kind for one in OPERATIONS for kind in (one.response, one.unavailable, one.error)]
    schemas = _components(kinds)
    for schema in schemas.values():
        properties = schema["properties"]
        # A field with a default is written too; one without either, UNSET, may be left out.
        sure = {*schema["required"], *(name for name, field in properties.items() if "default" in field)}
        schema["required"] = [name for name in properties if name in sure]
        schema["additionalProperties"] = False
        for field in properties.values():
            field.pop("default", None)
    return schemas
