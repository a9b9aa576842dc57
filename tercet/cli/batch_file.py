"""OpenAI batch files: each line a request, each answered by a line, through the server's own application.

The application is called in process, without a socket: validation, parameters and shapes of answers are the
server's, down to the status codes. Source: OpenAI's Batch API reference.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, TypeAlias

import msgspec

AsgiApp: TypeAlias = Callable[..., Awaitable[None]]

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions")
MAX_IN_FLIGHT: Final = 1024
"""Lines that are at the engine at a time: several times what a step takes, so that it always has a choice."""

OK: Final = 200


class _Stream(msgspec.Struct):
    stream: bool | None = None


class BatchLine(msgspec.Struct):
    """A request. `body` is handed on as it is."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LineResponse(msgspec.Struct):
    """What the application answered: `body` is the response, or an error in OpenAI's shape."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct):
    """Why a line has no result."""

    code: str
    message: str


class ResultLine(msgspec.Struct):
    """An answer. `error` is there whenever the line failed, `response` whenever the application saw it."""

    id: str
    custom_id: str | None
    response: LineResponse | None = None
    error: LineError | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _WithUsage(msgspec.Struct):
    usage: _Usage = msgspec.field(default_factory=_Usage)


class _ErrorDetail(msgspec.Struct):
    message: str = ""
    code: str | int | None = None
    type: str | None = None


class _WithError(msgspec.Struct):
    error: _ErrorDetail = msgspec.field(default_factory=_ErrorDetail)


class Totals:
    """What came of the lines so far."""

    def __init__(self) -> None:
        self.num_lines = self.num_failed = 0
        self.num_prompt_tokens = self.num_output_tokens = 0

    def add(self, result: ResultLine) -> None:
        self.num_lines += 1
        if result.error is not None:
            self.num_failed += 1
            return
        assert result.response is not None
        usage = msgspec.json.decode(result.response.body, type=_WithUsage).usage
        self.num_prompt_tokens += usage.prompt_tokens
        self.num_output_tokens += usage.completion_tokens

    def text(self, elapsed_s: float) -> str:
        """The figures in one line."""
        return (
            f"{self.num_lines} lines in {elapsed_s:.1f} s, {self.num_failed} failed; "
            f"{self.num_prompt_tokens} prompt tokens, {self.num_output_tokens} output tokens; "
            f"{self.num_lines / elapsed_s:.2f} requests/s, {self.num_output_tokens / elapsed_s:.1f} output tok/s"
        )


async def answer_lines(
    app: AsgiApp, lines: Iterable[bytes], max_in_flight: int = MAX_IN_FLIGHT
) -> AsyncGenerator[ResultLine, None]:
    """Answer each line that is not blank, in the order of the lines.

    A line that fails gets an error and the others go on. Leaving the iteration early aborts what is running.

    Args:
        app: the server's, attached to its engine.
        lines: taken as there is room.
    """
    running: deque[asyncio.Task[ResultLine]] = deque()
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            running.append(asyncio.create_task(answer_line(app, number, line)))
            if len(running) >= max_in_flight:
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def answer_line(app: AsgiApp, number: int, line: bytes) -> ResultLine:
    """Answer one line.

    Args:
        number: of the line in its file, for errors.
    """
    result = ResultLine(f"batch_req_{uuid.uuid4().hex}", None)
    try:
        request = msgspec.json.decode(line, type=BatchLine)
    except msgspec.MsgspecError as error:
        result.error = LineError("invalid_json_line", f"line {number}: {error}")
        return result
    result.custom_id = request.custom_id
    result.error = _refusal(number, request)
    if result.error is not None:
        return result
    response = await post(app, request.url, bytes(request.body), result.id)
    result.response = response
    if response.status_code != OK:
        detail = msgspec.json.decode(response.body, type=_WithError).error
        code = detail.code or detail.type or response.status_code
        result.error = LineError(str(code), f"line {number}: {detail.message}")
    return result


def _refusal(number: int, request: BatchLine) -> LineError | None:
    """Why the application is not asked; it knows more endpoints than make sense here."""
    if request.method != "POST":
        return LineError(
            "invalid_method", f"line {number}: method: must be 'POST'; got {request.method[:20]!r}"
        )
    if request.url not in ENDPOINTS:
        message = f"url: {request.url[:100]!r} is not supported; use {' or '.join(ENDPOINTS)}"
        return LineError("invalid_url", f"line {number}: {message}")
    try:
        is_stream = msgspec.json.decode(request.body, type=_Stream).stream
    except msgspec.MsgspecError as error:
        return LineError("invalid_request", f"line {number}: body: {error}")
    if is_stream:
        return LineError("invalid_request", f"line {number}: stream: a batch has no streams; leave it out")
    return None


async def post(app: AsgiApp, path: str, body: bytes, request_id: str) -> LineResponse:
    """One POST to an ASGI application, in process."""
    status, pieces, headers = 0, [], {}
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # this client does not leave; waiting for it to is cancelled
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            headers.update(message["headers"])
        else:
            pieces.append(message.get("body", b""))

    await app(_scope(path, len(body), request_id), receive, send)
    answered_id = headers.get(b"x-request-id", request_id.encode()).decode()
    return LineResponse(status, answered_id, msgspec.Raw(b"".join(pieces)))


def _scope(path: str, length: int, request_id: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(length).encode()),
            (b"x-request-id", request_id.encode()),
        ],
        "client": None,
        "server": None,
    }
