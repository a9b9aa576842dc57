"""Waiting for outputs: merging for slow consumers, one wait at a time, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tercet import EngineDeadError, RequestOutputKind
from tercet.frontend.output_processor import RequestState
from tercet.frontend.stream import RequestStream
from tercet.ipc.messages import Finish
from tests.frontend.fake_core import step_outputs
from tests.frontend.text_engine import Requests, ids_of, make_tokenizer

Test = Callable[[], Coroutine[Any, Any, None]]


def open_stream(requests: Requests, **params: Any) -> tuple[RequestStream, RequestState, int]:
    request, handle = requests.add(output_kind=RequestOutputKind.DELTA, **params)
    return RequestStream(request, requests.outputs, asyncio.get_running_loop()), request, handle


async def consumer_gets_every_token_once() -> None:
    requests = Requests(make_tokenizer())
    stream, _, handle = open_stream(requests)
    tokens = ids_of("some text for a stream")
    seen: list[int] = []

    async def consume() -> None:
        async for output in stream:
            seen.extend(output.outputs[0].token_ids)

    task = asyncio.create_task(consume())
    for i, token in enumerate(tokens):
        finish = {handle: Finish.LENGTH} if i == len(tokens) - 1 else None
        requests.outputs.apply(step_outputs({handle: [token]}, first=i, finish=finish))
        if i % 3 == 0:
            await asyncio.sleep(0)
    await task
    assert seen == tokens
    assert stream.finished


async def slow_consumer_gets_merged_deltas() -> None:
    requests = Requests(make_tokenizer())
    stream, _, handle = open_stream(requests)
    tokens = ids_of("a slow consumer fetches seldom")
    for i, token in enumerate(tokens):
        requests.outputs.apply(step_outputs({handle: [token]}, first=i))
    output = await stream.get()
    assert output.outputs[0].token_ids == tokens
    assert output.outputs[0].text == "a slow consumer fetches seldom"
    assert stream.get_nowait() is None


async def cancelled_wait_leaves_the_stream_usable() -> None:
    requests = Requests()
    stream, request, handle = open_stream(requests)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await stream.get()
    assert request.waiter is None
    requests.outputs.apply(step_outputs({handle: [5]}))
    assert (await stream.get()).outputs[0].token_ids == [5]


async def only_one_may_wait() -> None:
    requests = Requests()
    stream, _, handle = open_stream(requests)
    first = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="awaited elsewhere"):
        await stream.get()
    requests.outputs.apply(step_outputs({handle: [5]}))
    assert (await first).outputs[0].token_ids == [5]


async def closing_aborts_once() -> None:
    requests = Requests()
    stream, _, handle = open_stream(requests)
    stream.close()
    stream.close()
    assert requests.aborts == [([handle], Finish.ABORT)]
    assert stream.finished
    assert [output async for output in stream] == []
    with pytest.raises(RuntimeError, match="finished"):
        await stream.get()


async def closing_after_the_end_aborts_nothing() -> None:
    requests = Requests()
    stream, _, handle = open_stream(requests)
    requests.outputs.apply(step_outputs({handle: [5]}, finish={handle: Finish.EOS}))
    await stream.get()
    stream.close()
    assert requests.aborts == []


async def death_reaches_who_waits() -> None:
    requests = Requests()
    stream, _, _ = open_stream(requests)
    waiting = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    requests.outputs.fail_all(EngineDeadError("gone"))
    with pytest.raises(EngineDeadError, match="gone"):
        await waiting


async def finish_callbacks_run_once_each() -> None:
    requests = Requests()
    stream, _, handle = open_stream(requests)
    ended: list[str] = []
    stream.add_finish_callback(lambda request: ended.append("first"))
    stream.add_finish_callback(lambda request: ended.append("second"))
    requests.outputs.apply(step_outputs({handle: [5]}, finish={handle: Finish.EOS}))
    stream.add_finish_callback(lambda request: ended.append("late"))
    assert ended == ["first", "second", "late"]


TESTS: list[Test] = [
    consumer_gets_every_token_once,
    slow_consumer_gets_merged_deltas,
    cancelled_wait_leaves_the_stream_usable,
    only_one_may_wait,
    closing_aborts_once,
    closing_after_the_end_aborts_nothing,
    death_reaches_who_waits,
    finish_callbacks_run_once_each,
]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_stream(test: Test, run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    run(test())
