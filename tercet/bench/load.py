"""The load generator: sends planned requests at their times to a server and records the answers.

One process and one event loop; `load_process` runs several of these and merges what they recorded.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from tercet.bench.http_client import HttpError, Pool, Server
from tercet.bench.stream import RequestResult, StreamRecorder

REQUEST_TIMEOUT_S: Final = 6 * 3600.0
"""Longest answer that is waited for; vLLM's limit too."""


class PlannedRequest(msgspec.Struct, array_like=True, frozen=True):
    """A request ready to be sent.

    Attributes:
        index: in the run.
        offset_s: when it is to be sent, from the start of the run.
        body: JSON.
        request_id: sent as X-Request-Id.
    """

    index: int
    offset_s: float
    body: bytes
    request_id: str


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one load generator does.

    Attributes:
        server, path: where to.
        requests: in order of their offsets.
        max_concurrency: requests in flight at most; None is no limit. Others wait, in order.
        keep_text: keep the answers' texts.
    """

    server: Server
    path: str
    requests: list[PlannedRequest]
    max_concurrency: int | None = None
    keep_text: bool = False


class Generator:
    """Carries out a plan once."""

    def __init__(
        self, plan: LoadPlan, on_done: Callable[[RequestResult], None] = lambda result: None
    ) -> None:
        """
        Args:
            on_done: told of each request as it ends.
        """
        self._plan = plan
        self._on_done = on_done
        self._pool = Pool(plan.server)
        head = plan.server.head("POST", plan.path)
        self._head = head + b"Content-Type: application/json\r\nX-Request-Id: "
        limit = plan.max_concurrency
        self._places = asyncio.Semaphore(limit) if limit is not None else None

    async def run(self, start_s: float) -> list[RequestResult]:
        """Send every request at `start_s` (`time.perf_counter()`) + its offset; results in the plan's order."""
        tasks: list[asyncio.Task[RequestResult]] = []
        try:
            for request in self._plan.requests:
                delay_s = start_s + request.offset_s - time.perf_counter()
                if delay_s > 0:
                    await asyncio.sleep(delay_s)
                tasks.append(asyncio.create_task(self._send(request)))
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            self._pool.close()

    async def _send(self, request: PlannedRequest) -> RequestResult:
        if self._places is None:
            return await self._exchange(request, 0.0)
        arrived_s = time.perf_counter()
        async with self._places:
            return await self._exchange(request, time.perf_counter() - arrived_s)

    async def _exchange(self, request: PlannedRequest, queue_s: float) -> RequestResult:
        recorder = StreamRecorder()
        message = b"%b%b\r\nContent-Length: %d\r\n\r\n%b" % (
            self._head,
            request.request_id.encode(),
            len(request.body),
            request.body,
        )
        start_s = time.perf_counter()
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await self._pool.exchange(message, recorder)
        except TimeoutError:
            result = _failed(request, start_s, queue_s, f"no end of the answer within {REQUEST_TIMEOUT_S} s")
        except HttpError as error:
            result = _failed(request, start_s, queue_s, str(error))
        else:
            result = recorder.result(request.index, start_s, queue_s, keep_text=self._plan.keep_text)
        self._on_done(result)
        return result


def _failed(request: PlannedRequest, start_s: float, queue_s: float, problem: str) -> RequestResult:
    return RequestResult(index=request.index, start_s=start_s, queue_s=queue_s, error=problem)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No pauses by the garbage collector, and as many open files as the system allows.

    What a run allocates has no cycles, so nothing piles up meanwhile.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
