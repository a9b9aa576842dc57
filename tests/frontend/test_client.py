"""The connection: handshake, epochs, heartbeats, calls, and every way in which it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from tercet import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    QueueFullError,
    RequestError,
    SamplingParams,
    ValidationError,
)
from tercet.frontend import client as client_module
from tercet.frontend.client import CoreClient
from tercet.frontend.inputs import parse_prompt
from tercet.frontend.stream import RequestStream
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Call,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Reply,
    RequestFailed,
    ResetPrefixCache,
)
from tests.frontend.fake_core import EPOCH, FakeCore, step_outputs
from tests.frontend.text_engine import make_inputs

RUNS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    return RUNS[request.param]


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(function, *args)


async def connected(core: FakeCore, watch_process: bool = False) -> CoreClient:
    client = CoreClient(core.address)
    await client.connect("test", 10.0, watch_process)
    return client


def add(client: CoreClient, request_id: str = "r", **params: Any) -> tuple[RequestStream, int]:
    checked = SamplingParams(**params)
    prepared = make_inputs().prepare(parse_prompt([1, 2, 3]), checked, arrival_s=0.0)
    request = client.outputs.open(request_id, checked, 0.0)
    handle = client.outputs.admit(request, prepared)
    client.add(prepared.message(client.epoch, handle))
    return RequestStream(request, client.outputs, asyncio.get_running_loop()), handle


Run = Callable[[Coroutine[Any, Any, None]], None]


def test_handshake(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            hello = core.expect(Hello)
            assert (hello.protocol_version, hello.name, hello.pid) == (PROTOCOL_VERSION, "test", os.getpid())
            assert client.epoch == EPOCH
            assert client.welcome is not None
            assert client.welcome.model.name == "fake"
            client.close()
            assert core.expect(Goodbye).epoch == EPOCH

    run(test())


def test_nobody_listens(run: Run) -> None:
    async def test() -> None:
        with pytest.raises(ConfigError, match="no engine listens"):
            await CoreClient("ipc:///tmp/there-is-no-such-socket").connect("test", 1.0, False)

    run(test())


def test_no_answer(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            core.silent = True
            client = CoreClient(core.address)
            with pytest.raises(EngineDeadError, match="no answer"):
                await client.connect("test", 0.2, False)
            with pytest.raises(EngineDeadError):
                client.check()

    run(test())


def test_other_protocol_is_refused(run: Run) -> None:
    async def test() -> None:
        with FakeCore(welcome={"protocol_version": PROTOCOL_VERSION + 1, "version": "9.9"}) as core:
            client = CoreClient(core.address)
            with pytest.raises(EngineError, match=r"9\.9.*install the same version"):
                await client.connect("test", 10.0, False)

    run(test())


def test_refusal_names_the_cores_reason(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            core.silent = True
            connecting = asyncio.create_task(CoreClient(core.address).connect("test", 10.0, False))
            await in_thread(core.expect, Hello)
            core.send(Goodbye(epoch=EPOCH, reason="I speak another protocol"))
            with pytest.raises(EngineError, match="I speak another protocol"):
                await connecting

    run(test())


def test_messages_of_other_epochs_are_dropped_and_counted(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            stream, handle = add(client)
            core.send(
                step_outputs({handle: [66]}, epoch=EPOCH + 1),
                RequestFailed(epoch=EPOCH - 1, handle=handle, code="internal", message="x"),
                Goodbye(epoch=0, reason="of another life"),
                step_outputs({handle: [5]}),
            )
            assert (await stream.get()).outputs[0].token_ids == [5]
            assert client.num_dropped == 3
            client.close()

    run(test())


def test_heartbeats_are_sent_when_nothing_else_is(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            for _ in range(2):
                beat = await in_thread(core.expect, Heartbeat)
                assert beat.epoch == EPOCH
            client.close()

    run(test())


def test_silence_is_death(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENT_HEARTBEATS", 3)

    async def test() -> None:
        with FakeCore(welcome={"heartbeat_s": 0.01}) as core:
            client = await connected(core)
            stream, _ = add(client)
            with pytest.raises(EngineDeadError, match="no sign of life"):
                await asyncio.wait_for(stream.get(), 5)

    run(test())


def test_any_message_is_a_sign_of_life(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SILENT_HEARTBEATS", 20)

    async def test() -> None:
        with FakeCore(welcome={"heartbeat_s": 0.02}) as core:
            client = await connected(core)
            for _ in range(30):
                core.send(Heartbeat(epoch=EPOCH))
                await asyncio.sleep(0.02)
            assert client.dead_error is None
            client.close()

    run(test())


def test_goodbye_of_the_core_is_death(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            stream, _ = add(client)
            call = asyncio.create_task(client.call(ResetPrefixCache()))
            await in_thread(core.expect, Call)
            core.send(Goodbye(epoch=EPOCH, reason="shutting down"))
            with pytest.raises(EngineDeadError, match="shutting down"):
                await stream.get()
            with pytest.raises(EngineDeadError, match="shutting down"):
                await call
            with pytest.raises(EngineDeadError):
                add(client, "late")

    run(test())


def test_end_of_the_cores_process_is_noticed(run: Run) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def test() -> None:
        with FakeCore(welcome={"pid": process.pid, "heartbeat_s": 60.0}) as core:
            client = await connected(core, watch_process=True)
            stream, _ = add(client)
            process.send_signal(signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="process"):
                await asyncio.wait_for(stream.get(), 5)

    try:
        run(test())
    finally:
        process.kill()
        process.communicate()


def test_closing_tells_everyone(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            stream, _ = add(client)
            waiting = asyncio.create_task(stream.get())
            await asyncio.sleep(0)
            client.close()
            client.close()
            with pytest.raises(EngineClosedError):
                await waiting
            with pytest.raises(EngineClosedError):
                await client.call(ResetPrefixCache())

    run(test())


def test_calls_are_answered_by_id(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            tasks = [asyncio.create_task(client.call(ResetPrefixCache())) for _ in range(3)]
            ids = [(await in_thread(core.expect, Call)).call_id for _ in range(3)]
            core.send(
                Reply(epoch=EPOCH, call_id=ids[2], value=False),
                Reply(epoch=EPOCH, call_id=9999),
                Reply(epoch=EPOCH, call_id=ids[0]),
                Reply(epoch=EPOCH, call_id=ids[1], error="cannot"),
            )
            assert (await tasks[0]).value is True
            assert (await tasks[2]).value is False
            with pytest.raises(EngineError, match="cannot"):
                await tasks[1]
            client.close()

    run(test())


@pytest.mark.parametrize(
    ("code", "message", "error", "text"),
    [
        ("queue_full", "the queue is full", QueueFullError, "the queue is full"),
        ("invalid", "top_p: must be in (0, 1]", ValidationError, "top_p: must be"),
        ("unsupported", "adapter: not supported", ValidationError, "adapter: not supported"),
        ("internal", "row broke", RequestError, "request r: row broke"),
        ("paused", "no", RequestError, "request r: no"),
        ("shutdown", "leaving", EngineClosedError, "leaving"),
    ],
)
def test_failures_become_typed_errors(code: str, message: str, error: type[Exception], text: str) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            stream, handle = add(client)
            other, other_handle = add(client, "other")
            core.send(RequestFailed(epoch=EPOCH, handle=handle, code=code, message=message))
            with pytest.raises(error) as caught:
                await stream.get()
            assert text in str(caught.value)
            core.send(step_outputs({other_handle: [3]}))
            assert (await other.get()).outputs[0].token_ids == [3]
            client.close()

    asyncio.run(test())


def test_closed_stream_is_aborted_at_the_core(run: Run) -> None:
    async def test() -> None:
        with FakeCore() as core:
            client = await connected(core)
            stream, handle = add(client, n=2)
            assert (await in_thread(core.expect, AddRequest)).handle == handle
            stream.close()
            abort = await in_thread(core.expect, Abort)
            assert abort.handles.tolist() == [handle, handle + 1]
            assert abort.reason is Finish.ABORT
            client.close()

    run(test())
