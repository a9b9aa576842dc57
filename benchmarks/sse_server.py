"""A server of the OpenAI API that generates nothing: it streams words at set times, as cheaply as it can.

For measuring load generators and for testing them. What it sends and when is known exactly: each answer has
`max_tokens` tokens, the first after `first_s`, the next ones `gap_s` apart.

    python -m benchmarks.sse_server --first-ms 20 --gap-ms 5    # prints its port, serves until stdin ends
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast


@dataclass
class Behaviour:
    """How every answer goes.

    Attributes:
        first_s, gap_s: to the first chunk, and between chunks.
        tokens_per_chunk: words in one chunk; the last chunk may have fewer.
        usage: end with a chunk of usage.
        early_role: chats begin with a chunk that names the role, at once.
        closing_chunk: finish_reason comes in a chunk of its own, not with the last word.
        framing: 'chunked', 'close' (the body ends with the connection) or 'split' (chunked, in pieces of a few
            bytes, each its own write).
        line_end: of the event stream.
        stamps: instead of words send the time of sending, `time.perf_counter()`.
        status_of: HTTP status for a request's body; anything but 200 is answered with an error.
        error_after: send an error event after so many chunks.
        die_after: close the connection after so many chunks.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    tokens_per_chunk: int = 1
    usage: bool = True
    early_role: bool = False
    closing_chunk: bool = False
    framing: str = "chunked"
    line_end: str = "\n"
    stamps: bool = False
    status_of: Callable[[dict[str, Any]], int] = field(default=lambda body: 200)
    error_after: int | None = None
    die_after: int | None = None


@dataclass
class Exchange:
    """One request as the server saw it. Times are `time.perf_counter()`."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    received_s: float
    sent_s: list[float] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    def __init__(self, server: SseServer) -> None:
        self._server = server
        self._data = b""
        self._tasks: set[asyncio.Task[None]] = set()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's does not inherit from it
        self._server.num_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._tasks:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._data = rest[length:]
        body = json.loads(rest[:length]) if length else {}
        exchange = Exchange(first.split()[1], headers, body, time.perf_counter())
        task = asyncio.get_running_loop().create_task(self._server.answer(exchange, self))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class SseServer:
    """Listens on a free port of 127.0.0.1."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.exchanges: list[Exchange] = []
        self.num_connections = 0
        self.num_running = self.max_running = 0
        self.port = 0

    async def listen(self) -> asyncio.Server:
        server = await asyncio.get_running_loop().create_server(
            lambda: _Connection(self), "127.0.0.1", 0, backlog=4096
        )
        self.port = server.sockets[0].getsockname()[1]
        return server

    async def answer(self, exchange: Exchange, connection: _Connection) -> None:
        if exchange.path.endswith("/v1/models"):
            models = {"object": "list", "data": [{"id": "words", "object": "model", "root": "words-root"}]}
            _send_whole(connection, 200, models)
            return
        self.exchanges.append(exchange)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            status = self.behaviour.status_of(exchange.body)
            if status != 200:
                _send_whole(
                    connection, status, {"error": {"message": f"refused with {status}", "code": status}}
                )
            else:
                await self._stream(exchange, connection)
        finally:
            self.num_running -= 1

    async def _stream(self, exchange: Exchange, connection: _Connection) -> None:
        behaviour, transport = self.behaviour, connection.transport
        send = _sender(behaviour, transport)
        is_chat = "chat" in exchange.path
        num_tokens = int(exchange.body.get("max_tokens") or exchange.body["max_completion_tokens"])
        transport.write(_head(behaviour))
        if behaviour.early_role and is_chat:
            send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        due_s = exchange.received_s + behaviour.first_s
        sent = 0
        for number, start in enumerate(range(0, num_tokens, behaviour.tokens_per_chunk)):
            if (wait_s := due_s - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            due_s += behaviour.gap_s
            if number == behaviour.error_after:
                send({"error": {"message": "the engine fell over", "code": 500}})
                break
            if number == behaviour.die_after:
                transport.close()
                return
            sent = min(start + behaviour.tokens_per_chunk, num_tokens)
            ends = sent == num_tokens and not behaviour.closing_chunk
            exchange.sent_s.append(time.perf_counter())
            text = f" {exchange.sent_s[-1]:.6f}" if behaviour.stamps else " word" * (sent - start)
            send(_chunk(is_chat, text, "length" if ends else None))
        if behaviour.closing_chunk:
            send(_chunk(is_chat, "", "length"))
        if behaviour.usage:
            send({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": sent}})
        send(None)


def _chunk(is_chat: bool, text: str, finish_reason: str | None) -> dict[str, Any]:
    content = {"delta": {"content": text}} if is_chat else {"text": text}
    return {"id": "x", "model": "words", "choices": [{"index": 0, **content, "finish_reason": finish_reason}]}


def _head(behaviour: Behaviour) -> bytes:
    framing = b"Connection: close" if behaviour.framing == "close" else b"Transfer-Encoding: chunked"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n\r\n"


def _sender(behaviour: Behaviour, transport: asyncio.Transport) -> Callable[[dict[str, Any] | None], None]:
    """Sends an event; None is the end of the stream."""

    def send(event: dict[str, Any] | None) -> None:
        text = "[DONE]" if event is None else json.dumps(event)
        data = f"data: {text}{behaviour.line_end * 2}".encode()
        if behaviour.framing == "close":
            transport.write(data)
        else:
            framed = b"%x\r\n%b\r\n" % (len(data), data) + (b"0\r\n\r\n" if event is None else b"")
            step = 3 if behaviour.framing == "split" else len(framed)
            for start in range(0, len(framed), step):
                transport.write(framed[start : start + step])
        if event is None and behaviour.framing == "close":
            transport.close()

    return send


def _send_whole(connection: _Connection, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.transport.write(head.encode() + data)


@contextmanager
def serving(behaviour: Behaviour | None = None) -> Iterator[SseServer]:
    """A server in a thread of this process."""
    server = SseServer(behaviour or Behaviour())
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="sse-server", daemon=True)
    thread.start()
    listening = asyncio.run_coroutine_threadsafe(server.listen(), loop).result(10)
    try:
        yield server
    finally:

        async def end() -> None:
            listening.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _serve_until_stdin_ends(behaviour: Behaviour) -> None:
    server = SseServer(behaviour)
    async with await server.listen():
        print(server.port, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description="Stream words at set times.")
    parser.add_argument("--first-ms", type=float, default=0.0)
    parser.add_argument("--gap-ms", type=float, default=0.0)
    parser.add_argument("--stamps", action="store_true")
    args = parser.parse_args()
    behaviour = Behaviour(first_s=args.first_ms / 1e3, gap_s=args.gap_ms / 1e3, stamps=args.stamps)
    uvloop.run(_serve_until_stdin_ends(behaviour))


if __name__ == "__main__":
    main()
