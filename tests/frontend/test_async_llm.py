"""AsyncLLM against a scripted core: streams, cancellation, ids, loops, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import uvloop

from tercet import (
    AsyncLLM,
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    ValidationError,
)
from tercet.ipc.messages import (
    Abort,
    AddRequest,
    Call,
    Finish,
    GetMetrics,
    Goodbye,
    PauseGeneration,
    PauseMode,
    Reply,
    ResetPrefixCache,
    ResumeGeneration,
    Stats,
)
from tercet.ipc.telemetry import Metrics
from tests.frontend.fake_core import EPOCH, FakeCore, step_outputs
from tests.frontend.text_engine import ids_of, make_bundle, make_tokenizer

Run = Callable[[Coroutine[Any, Any, None]], None]
RUNS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


async def last_of(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    return [output async for output in outputs][-1]


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(function, *args)


@asynccontextmanager
async def engine_and_core(**fake: Any) -> AsyncIterator[tuple[AsyncLLM, FakeCore]]:
    with FakeCore(make_bundle(), **fake) as core:
        async with AsyncLLM.connect(core.address) as engine:
            yield engine, core


def echo(message: AddRequest) -> list[msgspec.Struct]:
    """Answers with the prompt's tokens, one a step, to every child."""
    tokens = message.token_ids.tolist()[: message.sampling.max_tokens]
    handles = range(message.handle, message.handle + len(message.seeds))
    return [
        step_outputs(
            {handle: [token] for handle in handles},
            first=i,
            finish=dict.fromkeys(handles, Finish.LENGTH) if i == len(tokens) - 1 else None,
        )
        for i, token in enumerate(tokens)
    ]


def test_connect_is_awaitable_and_a_context_manager(run: Run) -> None:
    async def test() -> None:
        with FakeCore(make_bundle(), answer=echo) as core:
            engine = await AsyncLLM.connect(core.address)
            assert engine.is_running
            assert engine.model_info.name == "fake"
            await engine.aclose()
            assert engine.is_stopped
            async with AsyncLLM.connect(core.address) as engine:
                assert await engine.tokenize("one two") == ids_of("one two")

    run(test())


def test_generate_streams_text(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, _):
            params = SamplingParams(output_kind=RequestOutputKind.DELTA, max_tokens=100)
            text = ""
            async for output in engine.generate("Hello there, world", params, "r1"):
                assert output.request_id == "r1"
                assert output.prompt == "Hello there, world"
                text += output.outputs[0].text
            assert text == "Hello there, world"
            assert output.finished

    run(test())


def test_prompts_and_parameters_cross_the_wire(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, core):
            params = SamplingParams(n=2, seed=9, stop_token_ids=[4], max_tokens=3)
            output = await last_of(engine.generate({"prompt": "abc", "cache_salt": "s"}, params, priority=5))
            assert [len(c.token_ids) for c in output.outputs] == [3, 3]
            message = core.expect(AddRequest)
            assert message.token_ids.tolist() == ids_of("abc")
            assert (message.cache_salt, message.priority, len(message.seeds)) == ("s", 5, 2)
            assert message.sampling.stop_token_ids == [4]

    run(test())


def test_many_requests_at_once(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, _):

            async def one(text: str) -> str:
                output = await last_of(engine.generate(text, SamplingParams(max_tokens=100)))
                return output.outputs[0].text

            texts = [f"request number {i} says {'abc' * (i % 7)}!" for i in range(60)]
            assert await asyncio.gather(*map(one, texts)) == texts
            assert engine.get_num_unfinished_requests() == 0

    run(test())


# ---- leaving early


def test_closing_the_generator_aborts(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):
            generator = engine.generate([5, 6], SamplingParams(), "r")
            pending = asyncio.ensure_future(anext(generator))
            handle = (await in_thread(core.expect, AddRequest)).handle
            core.send(step_outputs({handle: [9]}))
            await pending
            await generator.aclose()
            abort = await in_thread(core.expect, Abort)
            assert (abort.handles.tolist(), abort.reason) == ([handle], Finish.ABORT)
            assert engine.get_num_unfinished_requests() == 0

    run(test())


def test_cancelling_the_consumer_aborts(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):

            async def consume() -> None:
                async for _ in engine.generate("some text", SamplingParams()):
                    pass

            task = asyncio.create_task(consume())
            handle = (await in_thread(core.expect, AddRequest)).handle
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await in_thread(core.expect, Abort)).handles.tolist() == [handle]

    run(test())


def test_cancelling_while_tokenizing_sends_nothing(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):
            task = asyncio.ensure_future(anext(engine.generate("text " * 200, SamplingParams(), "r")))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.get_num_unfinished_requests() == 0
            core.answer = echo
            output = await last_of(engine.generate("again", SamplingParams(), "r"))
            assert output.finished
            assert core.expect(AddRequest).token_ids.tolist() == ids_of("again")

    run(test())


def test_abort_ends_the_stream_with_what_there_is(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):
            streams = [await engine.add_request("abc", SamplingParams(), name) for name in ("a", "b")]
            handles = [(await in_thread(core.expect, AddRequest)).handle for _ in streams]
            core.send(step_outputs({handle: ids_of("x") for handle in handles}))
            for stream in streams:
                assert not (await stream.get()).finished
            for wrong in (None, 5, ["a", 5], b"a"):
                with pytest.raises(ValidationError, match="request_id: must be a request id or a list"):
                    await engine.abort(wrong)  # type: ignore[arg-type]
            await engine.abort(["a", "b", "unknown"])
            for stream in streams:
                output = await stream.get()
                completion = output.outputs[0]
                assert (output.finished, completion.finish_reason, completion.text) == (True, "abort", "x")
            assert (await in_thread(core.expect, Abort)).reason is Finish.ABORT

    run(test())


def test_stop_string_aborts_at_the_core_as_a_stop(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):
            task = asyncio.ensure_future(anext(engine.generate("abc", SamplingParams(stop="!"), "r")))
            handle = (await in_thread(core.expect, AddRequest)).handle
            core.send(step_outputs({handle: [*ids_of("hi"), *ids_of("!"), *ids_of("x")]}))
            output = await task
            assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("hi", "!")
            assert (await in_thread(core.expect, Abort)).reason is Finish.EOS

    run(test())


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"prompt": []}, "prompt_token_ids"),
        ({"prompt": 5}, "prompt"),
        ({"sampling_params": {"n": 1}}, "sampling_params"),
        ({"request_id": ""}, "request_id"),
        ({"request_id": 5}, "request_id"),
        ({"request_id": "x" * 2000}, "request_id"),
        ({"priority": "high"}, "priority"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_sent(arguments: dict[str, Any], field: str) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, core):
            given = {"prompt": [1], "sampling_params": SamplingParams(), "request_id": "r", **arguments}
            with pytest.raises(ValidationError) as caught:
                await anext(engine.generate(**given))
            assert caught.value.field == field
            assert engine.get_num_unfinished_requests() == 0
            async for _ in engine.generate([7], SamplingParams(), "r"):
                pass
            assert core.expect(AddRequest).token_ids.tolist() == [7]

    asyncio.run(test())


def test_parameters_are_copied(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, core):
            params = SamplingParams(stop_token_ids=[3])
            stream = await engine.add_request("abc", params)
            assert params.stop_token_ids is not None
            params.stop_token_ids.append(10**9)
            assert (await stream.get()).outputs
            stream.close()
            assert core.expect(AddRequest).sampling.stop_token_ids == [3]

    run(test())


def test_request_ids_of_unfinished_requests_are_unique(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, _):
            stream = await engine.add_request([1], SamplingParams(), "same")
            with pytest.raises(ValidationError, match="request_id"):
                await engine.add_request([1], SamplingParams(), "same")
            assert engine.get_num_unfinished_requests() == 1  # the first one lives on
            stream.close()
            (await engine.add_request([1], SamplingParams(), "same")).close()

    run(test())


def test_several_are_sent_or_none(run: Run) -> None:
    from tercet.frontend.async_llm import NewRequest

    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, core):
            good, bad = NewRequest([1], SamplingParams()), NewRequest([10**6], SamplingParams())
            with pytest.raises(ValidationError):
                await engine.add_requests([good, bad])
            assert engine.get_num_unfinished_requests() == 0
            for stream in await engine.add_requests([good, good]):
                stream.close()
            core.expect(AddRequest)
            core.expect(AddRequest)

    run(test())


# ---- calls


def stats(**fields: Any) -> Stats:
    values = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**values, "epoch": EPOCH, **fields})


def test_calls(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):

            async def answered(awaitable: Coroutine[Any, Any, Any], **reply: Any) -> tuple[Any, Any]:
                task = asyncio.create_task(awaitable)
                call = await in_thread(core.expect, Call)
                core.send(Reply(epoch=EPOCH, call_id=call.call_id, **reply))
                return call.body, await task

            body, value = await answered(engine.reset_prefix_cache(), value=False)
            assert (type(body), value) == (ResetPrefixCache, False)
            assert not await engine.is_paused()
            body, _ = await answered(engine.pause_generation(mode="keep", clear_cache=False))
            assert body == PauseGeneration(mode=PauseMode.KEEP, clear_cache=False)
            assert await engine.is_paused()
            body, _ = await answered(engine.resume_generation())
            assert type(body) is ResumeGeneration
            assert not await engine.is_paused()
            first = stats(time_s=10.0, num_running=3, generation_tokens=100)
            told = Metrics(series=[], frontends=[], queues={})
            body, metrics = await answered(engine.get_metrics(), stats=first, metrics=told)
            assert type(body) is GetMetrics
            assert {m.name: m.value for m in metrics}["tercet:num_requests_running"] == 3
            await answered(engine.do_log_stats(), stats=first)
            second = stats(time_s=12.0, generation_tokens=500)
            with caplog.at_level("INFO", logger="tercet"):
                await answered(engine.do_log_stats(), stats=second)
            assert "generation 200.0 tok/s" in caplog.text
            with pytest.raises(EngineError, match="not now"):
                await answered(engine.reset_prefix_cache(), error="not now")
            with pytest.raises(ValidationError, match="mode"):
                await engine.pause_generation(mode="stop")  # type: ignore[arg-type]

    run(test())


# ---- death and the end


def test_death_reaches_every_stream_and_every_later_call(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core() as (engine, core):
            await engine.check_health()

            async def consume() -> None:
                async for _ in engine.generate([1], SamplingParams()):
                    pass

            tasks = [asyncio.create_task(consume()) for _ in range(5)]
            for _ in tasks:
                await in_thread(core.expect, AddRequest)
            core.send(Goodbye(epoch=EPOCH, reason="out of memory"))
            for task in tasks:
                with pytest.raises(EngineDeadError, match="out of memory"):
                    await task
            assert engine.errored
            assert not engine.is_running
            assert "out of memory" in str(engine.dead_error)
            with pytest.raises(EngineDeadError):
                await engine.check_health()
            with pytest.raises(EngineDeadError):
                await anext(engine.generate([1], SamplingParams()))
            with pytest.raises(EngineDeadError):
                await engine.reset_prefix_cache()

    run(test())


def test_shutdown_ends_streams(run: Run) -> None:
    async def test() -> None:
        with FakeCore(make_bundle()) as core:
            engine = await AsyncLLM.connect(core.address)
            stream = await engine.add_request([1], SamplingParams())
            waiting = asyncio.create_task(stream.get())
            await asyncio.sleep(0)
            engine.shutdown()
            with pytest.raises(EngineClosedError):
                await waiting
            engine.shutdown()
            await engine.aclose()
            assert not engine.errored
            with pytest.raises(EngineClosedError):
                await engine.check_health()

    run(test())


def test_shutdown_from_another_thread(run: Run) -> None:
    async def test() -> None:
        with FakeCore(make_bundle()) as core:
            engine = await AsyncLLM.connect(core.address)
            stream = await engine.add_request([1], SamplingParams())
            ending = asyncio.create_task(in_thread(engine.shutdown))
            with pytest.raises(EngineClosedError):
                await stream.get()
            await ending

    run(test())


def test_another_event_loop_is_refused(run: Run) -> None:
    with FakeCore(make_bundle()) as core:

        async def connect() -> AsyncLLM:
            return await AsyncLLM.connect(core.address)

        async def use(engine: AsyncLLM) -> None:
            with pytest.raises(EngineError, match="another event loop"):
                await anext(engine.generate([1], SamplingParams()))

        with asyncio.Runner() as runner:
            engine = runner.run(connect())
            run_in_thread(lambda: asyncio.run(use(engine)))
            runner.run(engine.aclose())


def test_two_loops_in_sequence_and_a_loop_that_ended_first(run: Run) -> None:
    with FakeCore(make_bundle(), answer=echo) as core:
        left: list[AsyncLLM] = []

        async def use() -> None:
            engine = await AsyncLLM.connect(core.address)
            left.append(engine)
            output = await last_of(engine.generate("abc", SamplingParams()))
            assert output.outputs[0].text == "abc"

        run(use())
        run(use())
        for engine in left:  # their loops are gone
            engine.shutdown()


def run_in_thread(function: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def target() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_works_off_the_main_thread(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, _):
            output = await last_of(engine.generate("abc", SamplingParams()))
            assert output.finished

    run_in_thread(lambda: run(test()))


def test_connecting_to_nothing(run: Run) -> None:
    async def test() -> None:
        for address in ("ipc:///tmp/no-such-tercet-socket", "tcp://127.0.0.1:5", "nonsense"):
            with pytest.raises(ConfigError, match="address"):
                await AsyncLLM.connect(address)

    run(test())


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_is_left_behind_and_nothing_of_the_host_is_changed(run: Run) -> None:
    async def test() -> None:
        async with engine_and_core(answer=echo) as (engine, _):
            async for _ in engine.generate("abc", SamplingParams()):
                pass
            with pytest.raises(EngineError):
                AsyncLLM(engine.address).model_info  # noqa: B018

    make_tokenizer()
    run(test())
    gc.collect()
    threads, fds = set(threading.enumerate()), open_fds()
    environment = dict(os.environ)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    policy = asyncio.get_event_loop_policy()
    for _ in range(3):
        run(test())
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert open_fds() == fds
    assert dict(os.environ) == environment
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == handlers
    assert asyncio.get_event_loop_policy() is policy


def test_a_dropped_engine_lets_go() -> None:
    async def test() -> None:
        with FakeCore(make_bundle()) as core:
            engine = await AsyncLLM.connect(core.address)
            del engine
            gc.collect()
            assert (await in_thread(core.expect, Goodbye)).epoch == EPOCH

    asyncio.run(test())
