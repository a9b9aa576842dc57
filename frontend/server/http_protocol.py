"""HTTP/1.1 by uvicorn and httptools, with limits on what a request may measure and how long it may take to come.

The parser keeps whatever it is sent, so the limits are looked at while bytes arrive, before they are kept. A
request beyond one of them is answered, where it has not been answered yet, and its connection is closed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from tercet.frontend.server.errors import ApiError
from tercet.frontend.server.limits import HttpLimits

MAX_PIPELINED = 16
"""Requests that one connection may send before the first of them is answered."""

_SLACK = 4096  # bytes of a head beside its URL, names and values: the method, colons, line ends


def _refusal(status: int, what: str, most: object, code: str) -> ApiError:
    return ApiError(status, f"{what}; at most {most} are taken", code=code, close=True)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Made by `protocol_class`."""

    limits = HttpLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head = True
        self._head_bytes = 0  # received of a head that is not complete
        self._header_bytes = 0
        self._body_bytes = 0
        self._refused = False
        self._refusal: ApiError | None = None  # why a callback ended the parsing
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._earlier: list[RequestResponseCycle] = []  # not answered yet when the next request came

    # ---- the connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._time(self.limits.head_timeout_s, "head")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.write_timeout_s, self._on_write_timeout)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _on_write_timeout(self) -> None:
        """The client does not read: what its request still makes would be for nobody."""
        self._write_timer = None
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_write_timer()
        for cycle in self._earlier:  # uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        limits = self.limits
        if self._in_head:
            if self._timer is None:
                self._time(limits.head_timeout_s, "head")
            self._head_bytes += len(data)
        super().data_received(data)
        most = limits.max_url_bytes + limits.max_header_bytes + _SLACK
        if self._in_head and self._head_bytes > most and not self._refused:
            self._refuse(
                _refusal(431, "the head of the request is too long", f"{most} bytes", "head_too_long")
            )

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to a request that could not be parsed, one that a callback refused included."""
        self._refuse(self._refusal or ApiError(400, msg, code="invalid_http", close=True))

    # ---- the parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes:
            most = f"{self.limits.max_url_bytes} bytes"
            raise self._too_much(414, "the URL is too long", most, "url_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        limits = self.limits
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > limits.max_header_bytes:
            most = f"{limits.max_header_bytes} bytes"
            raise self._too_much(431, "the headers are too long", most, "headers_too_long")
        super().on_header(name, value)
        if len(self.headers) > limits.max_header_count:
            raise self._too_much(
                431, "there are too many headers", limits.max_header_count, "too_many_headers"
            )
        if name.lower() == b"content-length" and value.isdigit() and int(value) > limits.max_body_bytes:
            raise self._body_refusal()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._time(self.limits.body_timeout_s, "body")
        before = self.cycle
        super().on_headers_complete()
        self._earlier = [cycle for cycle in self._earlier if not cycle.response_complete]
        if before is not None and before is not self.cycle and not before.response_complete:
            self._earlier.append(before)
            if len(self._earlier) > MAX_PIPELINED:
                raise self._too_much(429, "too many requests wait for their turn", MAX_PIPELINED, "pipelined")
            self.flow.resume_reading()  # uvicorn would read no more, and so not see that the client leaves

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self.limits.max_body_bytes:
            raise self._body_refusal()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._in_head = True
        super().on_message_complete()

    # ---- refusing

    def _body_refusal(self) -> ApiError:
        return self._too_much(
            413, "the body is too long", f"{self.limits.max_body_bytes} bytes", "body_too_long"
        )

    def _too_much(self, status: int, what: str, most: object, code: str) -> ApiError:
        """To be raised in a callback, by which the parser stops."""
        self._refusal = _refusal(status, what, most, code)
        return self._refusal

    def _time(self, timeout_s: float, part: str) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(timeout_s, self._on_timeout, part)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self, part: str) -> None:
        self._timer = None
        self._refuse(ApiError(408, f"the {part} of the request took too long", code="timeout", close=True))

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless a response is under way, and close."""
        self._refused = True
        self._stop_timer()
        if self.transport.is_closing():
            return
        under_way = (
            self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        )
        waiting = self.cycle is not None and not self.cycle.response_complete
        if not under_way:
            body = error.json()
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head % len(body) + body)
        if waiting:
            self.cycle.disconnected = True  # its task learns that it is over
            self.cycle.message_event.set()
        self.transport.close()


def protocol_class(limits: HttpLimits) -> type[asyncio.Protocol]:
    """The protocol with these limits, as uvicorn's `Config.http` takes it."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})
