"""One HTTP request to an endpoint that generates: read, admitted, guarded, answered as JSON or as a stream.

    read body ─▶ handler(call) ─┬─▶ bytes           one JSON response
                                └─▶ AsyncGenerator  server-sent events, a write for each item

The head of a stream's response leaves with its first item: until then an error has its own status. An error
after that is an event of the stream, followed by [DONE].
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

from starlette.datastructures import Headers

from tercet.frontend.server.admission import Ticket
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import ApiError, bad_request, of_exception, unavailable
from tercet.frontend.server.guard import Ended, Guard, Receive, RequestEndedError
from tercet.frontend.server.parameters import check_request_id
from tercet.frontend.server.sse import KEEP_ALIVE, StreamEnd

Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Events: TypeAlias = AsyncGenerator[bytes, None]

LAST_WORD_S: Final = 1.0  # for a client that does not read to take the last event of its stream
_SSE_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]


class Call:
    """What a handler gets.

    Attributes:
        body: as it came.
        request_id: of X-Request-Id, or drawn.
        has_request_id: whether the client gave it.
        ticket: the request's share of the limits.
        stream_end: how an error is said within the stream; a handler may set its own.
        timeout_s: the deadline that the request set itself; 0 where it set none.
        detached: whether the ticket is a background task's to release.
    """

    def __init__(self, context: ServerContext, headers: Headers, body: bytes, ticket: Ticket) -> None:
        self.context = context
        self.headers = headers
        self.body = body
        self.ticket = ticket
        given = check_request_id("X-Request-Id", headers.get("x-request-id"))
        self.has_request_id = given is not None
        self.request_id = given or uuid.uuid4().hex
        self.stream_end: StreamEnd = StreamEnd()
        self.timeout_s = _timeout(headers.get("x-request-timeout"))
        self.detached = False

    def name(self, given: str | None) -> str:
        """The request's id, where the body may hold one too; the header's goes first."""
        if given is not None and not self.has_request_id:
            self.request_id = check_request_id("request_id", given) or ""
        return self.request_id

    def engine_id(self) -> str:
        """An id for the engine: the client's own may be in use, as when it tries again too soon."""
        return f"{self.request_id}-{self.context.next_number()}"


def _timeout(text: str | None) -> float:
    if text is None:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e9:
        raise bad_request("X-Request-Timeout", "X-Request-Timeout: must be a number of seconds above 0")
    return seconds


Handler: TypeAlias = Callable[[Call], Awaitable["bytes | Events"]]


class GenerationEndpoint:
    """An ASGI application that answers POST requests by a handler.

    Args:
        is_chat: whether requests hold messages, for the words of errors.
        error_json: turns an error into the body of a response.
    """

    def __init__(
        self,
        context: ServerContext,
        handler: Handler,
        *,
        is_chat: bool = False,
        error_json: Callable[[ApiError], bytes] = ApiError.json,
    ) -> None:
        self._context = context
        self._handler = handler
        self._is_chat = is_chat
        self._error_json = error_json

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        answer = _Answer(send, self._error_json)
        ticket: Ticket | None = None
        call: Call | None = None
        try:
            self._context.check_open()
            self._context.engine  # noqa: B018  (503 before the body is read)
            ticket = self._context.admission.admit(int(headers.get("content-length", "0")))
            body = await read_body(receive)
            call = Call(self._context, headers, body, ticket)
            answer.request_id = call.request_id
            await self._serve(call, receive, answer)
        except RequestEndedError as ended:
            await answer.end(ended.reason)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever went wrong is this request's affair
            await answer.fail(of_exception(error, chat=self._is_chat))
        finally:
            if ticket is not None and not (call is not None and call.detached):
                ticket.release()

    async def _serve(self, call: Call, receive: Receive, answer: _Answer) -> None:
        context = self._context
        limits_s = [limit for limit in (call.timeout_s, context.settings.request_timeout_s) if limit > 0]
        async with Guard(receive, context.guards, min(limits_s, default=0.0)):
            reply = await self._handler(call)
            answer.request_id, answer.stream_end = call.request_id, call.stream_end
            if isinstance(reply, bytes):
                await answer.json(200, reply)
            else:
                await answer.events(reply, context.settings.sse_keep_alive_s)


async def read_body(receive: Receive) -> bytes:
    """The whole body. Its size is bounded by the server (`http_protocol.py`).

    Raises:
        RequestEndedError: the client has left.
    """
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestEndedError(Ended.DISCONNECTED)
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _Answer:
    """The response, as far as it has been sent."""

    def __init__(self, send: Send, error_json: Callable[[ApiError], bytes]) -> None:
        self._send = send
        self._error_json = error_json
        self._started = False
        self._last_sent_s = 0.0
        self.request_id = ""
        self.stream_end = StreamEnd()

    async def json(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """The whole response."""
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [(b"content-type", b"application/json"), length, *(headers or [])])
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, events: Events, keep_alive_s: float) -> None:
        """A stream, an item at a time: what the engine has meanwhile is one item."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(contextlib.aclosing(events))
            if keep_alive_s:
                task = asyncio.create_task(self._keep_alive(keep_alive_s))
                stack.callback(task.cancel)
            send = self._send
            async for data in events:
                if not self._started:
                    await self._start(200, _SSE_HEADERS)
                if keep_alive_s:
                    self._last_sent_s = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """An error, in whichever form the response still takes."""
        if not self._started:
            await self.json(error.status, self._error_json(error), error.headers())
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORD_S):
                body = self.stream_end.error(error)
                await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def end(self, reason: Ended) -> None:
        """The request was ended from outside."""
        match reason:
            case Ended.DISCONNECTED:
                pass  # there is nobody to tell
            case Ended.DEADLINE:
                await self.fail(ApiError(504, reason.value, kind="timeout", code="deadline_exceeded"))
            case Ended.SHUTDOWN:
                await self.fail(unavailable(reason.value, "shutting_down"))

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._started = True
        if self.request_id:
            headers = [*headers, (b"x-request-id", self.request_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _keep_alive(self, interval_s: float) -> None:
        """Comments while the stream is silent, from before its first token on."""
        self._last_sent_s = time.monotonic()
        while True:
            await asyncio.sleep(interval_s - (time.monotonic() - self._last_sent_s))
            if time.monotonic() - self._last_sent_s < interval_s:
                continue
            if not self._started:
                await self._start(200, _SSE_HEADERS)
            self._last_sent_s = time.monotonic()
            await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
