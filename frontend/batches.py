"""Requests by the batch, for `LLM`: sent in order as the engine has room, collected in the same order.

Everything here runs on the engine's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from tercet.frontend.async_llm import AsyncLLM, NewRequest
from tercet.frontend.output_processor import RequestState
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.progress import Progress
from tercet.frontend.stream import RequestStream

MAX_UNFINISHED: Final = 4096
"""Completions that an `LLM` has at the core at a time: enough to choose from, within its queue's bound."""

CHUNK: Final = 16  # prompts tokenized at a time, while earlier ones are computed


class Window:
    """How many completions are at the core, and a place to wait until there is room for more."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._room = asyncio.Event()
        self._room.set()

    async def wait_for_room(self) -> None:
        await self._room.wait()

    def enter(self, stream: RequestStream, n: int) -> None:
        self._used += n
        if self._used >= self._size:
            self._room.clear()
        stream.add_finish_callback(lambda request: self._leave(request, n))

    def _leave(self, request: RequestState, n: int) -> None:
        self._used -= n
        if self._used < self._size or request.error is not None:  # after an error nobody may wait for room
            self._room.set()


async def generate_all(
    engine: AsyncLLM, requests: Sequence[NewRequest], progress: Progress, add_special_tokens: bool
) -> list[RequestOutput]:
    """Send every request and collect the outputs. An error, or being cancelled, aborts them all."""
    streams: list[RequestStream] = []
    try:
        await _send(
            engine,
            requests,
            Window(MAX_UNFINISHED),
            streams,
            add_special_tokens=add_special_tokens,
            on_sent=lambda stream: _count(stream, progress),
        )
        return [await stream.get() for stream in streams]
    finally:
        for stream in streams:
            stream.close()


class Pending:
    """What `LLM.enqueue` has sent and `LLM.wait_for_completion` has not collected."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine
        self._window = Window(MAX_UNFINISHED)
        self._streams: list[RequestStream] = []

    def __len__(self) -> int:
        return len(self._streams)

    async def add(self, requests: Sequence[NewRequest], progress: Progress) -> list[str]:
        """Send requests; returns their ids. An error, or being cancelled, aborts those of this call."""
        streams: list[RequestStream] = []
        try:
            await _send(
                self._engine,
                requests,
                self._window,
                streams,
                add_special_tokens=True,
                on_sent=lambda stream: progress.finished(stream.num_prompt_tokens, 0),
            )
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        self._streams += streams
        return [stream.request_id for stream in streams]

    async def collect(self, progress: Progress) -> list[RequestOutput]:
        """Outputs of all that was added, in that order. An error, or being cancelled, aborts the rest."""
        streams, self._streams = self._streams, []
        try:
            for stream in streams:
                _count(stream, progress)
            return [await stream.get() for stream in streams]
        finally:
            for stream in streams:
                stream.close()


async def _send(
    engine: AsyncLLM,
    requests: Sequence[NewRequest],
    window: Window,
    into: list[RequestStream],
    *,
    add_special_tokens: bool,
    on_sent: Callable[[RequestStream], None],
) -> None:
    for start in range(0, len(requests), CHUNK):
        chunk = requests[start : start + CHUNK]
        await window.wait_for_room()
        added = await engine.add_requests(chunk, add_special_tokens=add_special_tokens)
        into += added
        for stream, request in zip(added, chunk, strict=True):
            window.enter(stream, request.params.n)
            on_sent(stream)
        await asyncio.sleep(0)  # prompts of token ids are prepared in place: let outputs in between


def _count(stream: RequestStream, progress: Progress) -> None:
    """Have the bar go on when the request is finished."""

    def on_finish(request: RequestState) -> None:
        num_tokens = sum(len(child.token_ids) for child in request.children)
        progress.finished(len(request.prompt_token_ids), num_tokens)

    stream.add_finish_callback(on_finish)
