"""A lean HTTP/1.1 client for the load generator: POST a body, hand on the answer's bytes as they come.

An `asyncio.Protocol` of our own rather than a general client, because the generator shares its machine with
what it measures: nothing stands between the callback that receives the bytes, which takes the time of their
arrival, and the recorder (docs/benchmarking.md has the figures). It speaks what servers send to a POST:
Content-Length, chunked and read-until-close bodies, keep-alive; no redirects, compression or proxies.
Source: RFC 9112.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Final, Protocol, cast
from urllib.parse import urlsplit

import msgspec

from tercet.errors import ConfigError

MAX_HEAD_BYTES: Final = 64 << 10


class HttpError(Exception):
    """The connection failed, or the server's answer is not HTTP/1.1 as understood here."""


class ClosedEarlyError(HttpError):
    """The server closed a connection before any byte of an answer, as it may with one that was idle."""


class Receiver(Protocol):
    """Takes one answer. The times are `time.perf_counter()` in seconds, of the read that brought the bytes."""

    def on_head(self, status: int, now: float) -> None: ...

    def on_body(self, data: bytes, now: float) -> None: ...


class Server(msgspec.Struct, frozen=True):
    """Where requests go: origin and headers that all requests share."""

    host: str
    port: int
    tls: bool = False
    verify: bool = True
    headers: dict[str, str] = {}

    @classmethod
    def from_url(cls, url: str, headers: dict[str, str], *, verify: bool = True) -> tuple[Server, str]:
        """The server of a base URL, and the path that the URL has before each endpoint.

        Raises:
            ConfigError: it is no http or https URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError("base_url", f"{url!r} is not a URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("base_url", f"{url!r} must be a URL such as http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        server = cls(parts.hostname, port or (443 if tls else 80), tls, verify, headers)
        return server, parts.path.rstrip("/")

    def ssl_context(self) -> ssl.SSLContext | None:
        """For `create_connection`; None without TLS."""
        if not self.tls:
            return None
        context = ssl.create_default_context()
        if not self.verify:  # --insecure
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def head(self, method: str, path: str) -> bytes:
        """Request line and shared headers; what is each request's own follows.

        Raises:
            ConfigError: a header or the path has characters that would end its line.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}:{self.port}", "Accept-Encoding: identity"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if any("\r" in line or "\n" in line for line in lines):
            raise ConfigError("header", "a header, host or endpoint must not contain line ends")
        return "\r\n".join(lines).encode("utf-8") + b"\r\n"


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._receiver: Receiver | None = None
        self._done: asyncio.Future[None] | None = None
        self._buffer = b""
        self._in_head = True
        self._left = 0  # bytes of the body, or of its current chunk, that are still to come; -1: until close
        self._chunked = False
        self._after_chunk = False
        self._in_trailer = False
        self._close_after = False
        self._lost = False
        self.num_exchanges = 0

    @property
    def reusable(self) -> bool:
        """Whether another exchange can follow."""
        transport = self._transport
        return not self._lost and transport is not None and not transport.is_closing()

    async def exchange(self, request: bytes, receiver: Receiver) -> None:
        """Send a request and return once its answer is complete.

        Raises:
            ClosedEarlyError, HttpError: the answer did not come, or is not whole.
        """
        if self._transport is None or self._lost:
            raise ClosedEarlyError("the server closed the connection")
        self._receiver = receiver
        self._in_head = True
        self._done = done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        self.num_exchanges += 1
        try:
            await done
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._receiver = self._done = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's does not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._done is None or self._done.done():
            return
        if not self._in_head and self._left < 0 and exc is None:
            self._finish()  # a body that ends with the connection
        elif self._in_head and not self._buffer:
            self._fail(ClosedEarlyError(f"the server closed the connection without an answer{_cause(exc)}"))
        else:
            self._fail(HttpError(f"the connection ended in the middle of the answer{_cause(exc)}"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._receiver is None:  # bytes that nobody asked for
            self.close()
            return
        try:
            self._receive(self._buffer + data if self._buffer else data, now)
        except (HttpError, ValueError) as error:
            self._fail(HttpError(f"the answer is not HTTP/1.1: {error}"))

    # ---- parsing

    def _receive(self, data: bytes, now: float) -> None:
        assert self._receiver is not None
        self._buffer = b""
        while self._in_head:
            head, found, rest = data.partition(b"\r\n\r\n")
            if not found:
                if len(data) > MAX_HEAD_BYTES:
                    raise HttpError("its head is too long")
                self._buffer = data
                return
            data = rest
            self._parse_head(head, now)
        if self._chunked:
            self._receive_chunked(data, now)
        elif self._left < 0:
            self._receiver.on_body(data, now)
        else:
            self._left -= len(data)
            if data:
                self._receiver.on_body(data, now)
            if self._left <= 0:
                self._finish()

    def _parse_head(self, head: bytes, now: float) -> None:
        lines = head.split(b"\r\n")
        version, _, rest = lines[0].partition(b" ")
        if not version.startswith(b"HTTP/1."):
            raise HttpError(f"it begins with {lines[0][:40]!r}")
        status = int(rest[:3])
        if status < 200:  # an interim answer: the real one follows
            return
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(b":") for line in lines[1:])
        }
        connection = headers.get(b"connection", b"")
        self._close_after = connection == b"close" or (version == b"HTTP/1.0" and connection != b"keep-alive")
        self._chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        self._after_chunk = self._in_trailer = False
        if self._chunked or status in (204, 304):
            self._left = 0
        else:
            self._left = int(headers.get(b"content-length", b"-1"))
        self._in_head = False
        assert self._receiver is not None
        self._receiver.on_head(status, now)

    def _receive_chunked(self, data: bytes, now: float) -> None:
        """Chunks are size line, data, CRLF; a chunk of size 0 and a trailer end the body.

        What one read brings is handed on in one piece: streams under load come several chunks at a time.
        """
        pieces: list[bytes] = []
        ended = self._parse_chunks(data, pieces)
        if pieces:
            assert self._receiver is not None
            self._receiver.on_body(pieces[0] if len(pieces) == 1 else b"".join(pieces), now)
        if ended:
            self._finish()

    def _parse_chunks(self, data: bytes, pieces: list[bytes]) -> bool:
        """Whether the body is complete; what is left of a line is kept for the next read."""
        at, end = 0, len(data)
        while at < end:
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                self._after_chunk = self._left == 0
                pieces.append(piece)
                continue
            line_end = data.find(b"\r\n", at)
            if line_end < 0:
                self._buffer = data[at:]
                return False
            line, at = data[at:line_end], line_end + 2
            if self._after_chunk:
                self._after_chunk = False
            elif self._in_trailer:
                if not line:
                    return True
            else:
                size = int(line.partition(b";")[0], 16)
                if size < 0:
                    raise HttpError("it has a chunk of negative size")
                after = at + size + 2
                if size and after <= end:  # the usual case: a whole chunk
                    pieces.append(data[at : after - 2])
                    at = after
                else:
                    self._left = size
                    self._in_trailer = size == 0
        return False

    def _finish(self) -> None:
        if self._close_after or self._left < 0:
            self.close()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: HttpError) -> None:
        self.close()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def _cause(error: Exception | None) -> str:
    return f": {error}" if error is not None else ""


class Pool:
    """Connections to one server; the one that was used last is used next."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ssl = server.ssl_context()
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, receiver: Receiver) -> None:
        """Send on an idle connection, or on a new one.

        Raises:
            HttpError: no connection, or no whole answer.
        """
        connection = self._take_idle() or await self._connect()
        try:
            await connection.exchange(request, receiver)
        except ClosedEarlyError:
            if connection.num_exchanges <= 1:
                raise
            connection = await self._connect()  # an idle connection that the server had just given up
            await connection.exchange(request, receiver)
        if connection.reusable:
            self._idle.append(connection)

    def close(self) -> None:
        """Close idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        return None

    async def _connect(self) -> Connection:
        server = self._server
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, server.host, server.port, ssl=self._ssl)
        except OSError as error:  # certificate errors are OSErrors too
            raise HttpError(f"cannot connect to {server.host}:{server.port}: {error}") from None
        return connection


class _Collector:
    """A whole answer."""

    def __init__(self) -> None:
        self.status = 0
        self.pieces: list[bytes] = []

    def on_head(self, status: int, now: float) -> None:
        self.status = status

    def on_body(self, data: bytes, now: float) -> None:
        self.pieces.append(data)


async def get(server: Server, path: str) -> tuple[int, bytes]:
    """GET a small document: status and body. Raises HttpError."""
    pool = Pool(server)
    collector = _Collector()
    try:
        await pool.exchange(server.head("GET", path) + b"\r\n", collector)
    finally:
        pool.close()
    return collector.status, b"".join(collector.pieces)
