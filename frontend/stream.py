"""A request's outputs as something to wait for, on an asyncio event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Self

from tercet.frontend.output_processor import OutputProcessor, RequestState
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.waking import TaskWaiter, TaskWaker


class RequestStream:
    """One request's outputs, for one consumer. Outputs not fetched yet merge into one.

    Iterate it (`async for output in stream`), or call `get` until `finished`. Whoever leaves early calls
    `close`, which aborts the request.
    """

    __slots__ = ("_outputs", "_request", "_waiter")

    def __init__(
        self, request: RequestState, outputs: OutputProcessor, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._request = request
        self._outputs = outputs
        if outputs.waker is None or outputs.waker.loop is not loop:
            outputs.waker = TaskWaker(loop)
        self._waiter = TaskWaiter(request, outputs.waker)

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt_token_ids)

    @property
    def finished(self) -> bool:
        """Whether the last output has been fetched, or the request's error raised."""
        return self._request.taken

    def get_nowait(self) -> RequestOutput | None:
        """What is new, or None where nothing is.

        Raises:
            QueueFullError, RequestError, ValidationError: the engine refused or failed this request.
            EngineDeadError, EngineClosedError: there is no engine any more.
        """
        return self._request.take()

    async def get(self) -> RequestOutput:
        """Wait until something is new. Raises as `get_nowait`; RuntimeError after the last output."""
        request = self._request
        while not request.ready:
            if request.taken:
                raise RuntimeError(f"request {request.request_id} is finished and has been fetched")
            await self._waiter
        return request.take_ready()

    def add_finish_callback(self, callback: Callable[[RequestState], None]) -> None:
        """Call this once nothing more will come for the request; at once, if that is so already."""
        request = self._request
        if request.finished:
            callback(request)
        else:
            request.on_finish = (*request.on_finish, callback)

    def close(self) -> None:
        """Abort the request unless it has ended; its outputs are gone. Idempotent."""
        request = self._request
        if not request.taken:
            self._outputs.abort(request)
            request.discard()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        # As `get`, but without a second coroutine: this is run for every token.
        request = self._request
        if request.taken:
            raise StopAsyncIteration
        while not request.ready:
            if request.taken:  # closed meanwhile
                raise StopAsyncIteration
            await self._waiter
        return request.take_ready()


class _FirstOf:
    """A waiter in several places, which the first one ready wakes."""

    __slots__ = ("woken",)

    def __init__(self) -> None:
        self.woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


async def wait_for_any(streams: Sequence[RequestStream]) -> None:
    """Wait until `get_nowait` of one of these has something to give or to raise, or until all are finished.

    For one consumer of several streams, who has no other that waits on them.
    """
    requests = [stream._request for stream in streams if not stream._request.taken]
    if not requests or any(request.ready for request in requests):
        return
    waiter = _FirstOf()
    for request in requests:
        if request.waiter is not None:
            raise RuntimeError("the outputs of this request are being awaited elsewhere")
        request.waiter = waiter
    try:
        await waiter.woken
    finally:
        for request in requests:
            if request.waiter is waiter:
                request.waiter = None
