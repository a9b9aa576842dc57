"""Waiting for outputs: merging for slow consumers, one wait at a time, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextvars import ContextVar
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


async def cancelled_just_after_the_news_came_nothing_is_lost() -> None:
    requests = Requests()
    stream, request, handle = open_stream(requests)
    task = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    requests.outputs.apply(step_outputs({handle: [5]}))
    task.cancel("too late")
    with pytest.raises(asyncio.CancelledError, match="too late"):
        await task
    assert request.waiter is None
    assert (await stream.get()).outputs[0].token_ids == [5]


async def cancelled_and_waiting_again_it_gets_the_next_news() -> None:
    requests = Requests()
    stream, _, handle = open_stream(requests)
    seen: list[int | str] = []

    async def consume() -> None:
        for _ in range(2):
            try:
                while True:
                    seen.extend((await stream.get()).outputs[0].token_ids)
            except asyncio.CancelledError:
                seen.append("cancelled")

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    task.cancel()
    requests.outputs.apply(step_outputs({handle: [5]}))  # its wake-up is on the way when the task waits again
    await asyncio.sleep(0)
    requests.outputs.apply(step_outputs({handle: [6]}, first=1))
    await asyncio.sleep(0)
    requests.outputs.apply(step_outputs({handle: [7]}, first=2))
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert seen == ["cancelled", 5, 6, 7, "cancelled"]


async def a_wait_that_is_closed_leaves_the_stream_usable() -> None:
    requests = Requests()
    stream, request, handle = open_stream(requests)
    waiting = stream.get()
    waiting.send(None)
    assert request.waiter is not None
    waiting.close()
    assert request.waiter is None
    requests.outputs.apply(step_outputs({handle: [5]}))
    assert (await stream.get()).outputs[0].token_ids == [5]


async def one_message_wakes_all_in_its_order_each_in_its_own_context() -> None:
    requests = Requests()
    name: ContextVar[int] = ContextVar("name")
    order: list[tuple[int, int]] = []
    handles = {}

    async def consume(i: int, stream: RequestStream) -> None:
        name.set(i)
        async for output in stream:
            order.append((name.get(), output.outputs[0].token_ids[0]))

    tasks = []
    for i in range(5):
        request, handle = requests.add(request_id=str(i), output_kind=RequestOutputKind.DELTA)
        stream = RequestStream(request, requests.outputs, asyncio.get_running_loop())
        tasks.append(asyncio.create_task(consume(i, stream)))
        handles[handle] = i
    await asyncio.sleep(0)
    for step in range(3):
        finish = dict.fromkeys(handles, Finish.LENGTH) if step == 2 else None
        message: dict[int, Sequence[int]] = {
            handle: [10 * step + i] for handle, i in reversed(handles.items())
        }
        requests.outputs.apply(step_outputs(message, first=step, finish=finish))
        await asyncio.sleep(0)  # one turn of the loop is enough for all
        assert order == [(i, 10 * step + i) for i in reversed(range(5))]
        order.clear()
    await asyncio.gather(*tasks)


async def it_can_be_awaited_in_every_way() -> None:
    requests = Requests()
    stream, _, handle = open_stream(requests)
    loop = asyncio.get_running_loop()
    ways: list[Callable[[], Awaitable[Any]]] = [
        stream.get,
        lambda: asyncio.wait_for(stream.get(), 5),
        lambda: asyncio.shield(asyncio.create_task(stream.get())),
        lambda: asyncio.gather(stream.get()),
        lambda: asyncio.tasks._PyTask(stream.get(), loop=loop),  # type: ignore[attr-defined]
        stream.__anext__,
    ]
    for i, way in enumerate(ways):
        loop.call_later(0.001, requests.outputs.apply, step_outputs({handle: [i]}, first=i))
        found = await way()
        output = found[0] if isinstance(found, list) else found
        assert output.outputs[0].token_ids == [i]


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
    cancelled_just_after_the_news_came_nothing_is_lost,
    cancelled_and_waiting_again_it_gets_the_next_news,
    a_wait_that_is_closed_leaves_the_stream_usable,
    one_message_wakes_all_in_its_order_each_in_its_own_context,
    it_can_be_awaited_in_every_way,
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


@pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_an_interrupt_in_one_consumer_does_not_keep_the_others_waiting(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    loop = new_loop()
    requests = Requests()
    tasks, handles = [], []

    async def consume(i: int, stream: RequestStream) -> list[int]:
        output = await stream.get()
        if i == 1:
            raise KeyboardInterrupt
        return output.outputs[0].token_ids

    for i in range(4):
        request, handle = requests.add(request_id=str(i), output_kind=RequestOutputKind.DELTA)
        tasks.append(loop.create_task(consume(i, RequestStream(request, requests.outputs, loop))))
        handles.append(handle)
    loop.run_until_complete(asyncio.sleep(0))
    requests.outputs.apply(step_outputs({handle: [handle] for handle in handles}))
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(asyncio.sleep(1))
    with pytest.raises(KeyboardInterrupt):
        tasks[1].result()
    others = [tasks[i] for i in (0, 2, 3)]
    found = loop.run_until_complete(asyncio.wait_for(asyncio.gather(*others), 5))
    assert found == [[handles[i]] for i in (0, 2, 3)]
    loop.close()


def test_a_stream_is_awaited_on_its_own_loop_only() -> None:
    loop = asyncio.new_event_loop()
    request, _ = (requests := Requests()).add(output_kind=RequestOutputKind.DELTA)
    stream = RequestStream(request, requests.outputs, loop)
    with pytest.raises(RuntimeError, match="attached to a different loop"):
        asyncio.run(stream.get())
    assert request.waiter is None
    loop.close()
