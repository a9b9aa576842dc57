"""AsyncLLM with real processes: a core and a simulated worker."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from tercet import (
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    EngineClosedError,
    EngineDeadError,
    RequestOutputKind,
    SamplingParams,
    StartupError,
)
from tercet.config import SimulationConfig
from tercet.frontend.metrics import Counter, Gauge
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.stream import RequestStream
from tercet.ipc.address import socket_path
from tercet.ipc.messages import CheckInvariants
from tests.frontend.text_engine import make_bundle

RUNS: dict[str, Callable[[Coroutine[Any, Any, None]], None]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}
LONG = 4000  # tokens: more than any test waits for
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=list(RUNS))
def run(request: pytest.FixtureRequest) -> Run:
    return RUNS[request.param]


def make_args(step_us: float = 0.0, **fields: Any) -> AsyncEngineArgs:
    simulation = SimulationConfig(step_us=step_us, verify=True)
    return AsyncEngineArgs(
        device="simulated", simulation=simulation, max_model_len=8192, audit=True, **fields
    )


async def start(args: EngineArgs) -> AsyncLLM:
    engine = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
    await engine.start()
    return engine


async def last_of(engine: AsyncLLM, prompt: Any, **params: Any) -> RequestOutput:
    return [output async for output in engine.generate(prompt, SamplingParams(ignore_eos=True, **params))][-1]


async def end_of(stream: RequestStream) -> RequestOutput:
    return [output async for output in stream][-1]


async def gauges(engine: AsyncLLM) -> dict[str, float]:
    metrics = [m for m in await engine.get_metrics() if isinstance(m, (Counter, Gauge))]
    values = {m.name.removeprefix("tercet:"): float(m.value) for m in metrics}
    reasons = {m.labels["finished_reason"]: m.value for m in metrics if m.name == "tercet:request_success"}
    return values | {"request_aborted": float(reasons["abort"])}


async def idle(engine: AsyncLLM) -> dict[str, float]:
    """Wait until the engine holds nothing any more."""
    deadline = time.monotonic() + 10
    while True:
        values = await gauges(engine)
        if (
            not values["num_requests_running"]
            + values["num_requests_waiting"]
            + values["kv_cache_usage_perc"]
        ):
            await engine._client.call(CheckInvariants())
            return values
        assert time.monotonic() < deadline, values
        await asyncio.sleep(0.01)


def test_two_frontends_stream_at_once_and_one_leaving_disturbs_no_one(run: Run) -> None:
    async def test() -> None:
        async with await start(make_args(step_us=500)) as engine:
            alone = (await last_of(engine, [1, 2, 3], max_tokens=60, seed=5)).outputs[0].token_ids
            second = await AsyncLLM.connect(engine.address)
            stream = await second.add_request([9] * 40, SamplingParams(max_tokens=LONG, ignore_eos=True))
            await stream.get()
            task = asyncio.create_task(last_of(engine, [1, 2, 3], max_tokens=60, seed=5))
            await stream.get()
            await second.aclose()
            with pytest.raises(EngineClosedError):
                await stream.get()
            assert (await task).outputs[0].token_ids == alone
            assert (await idle(engine))["num_frontends"] == 1

    run(test())


def test_cancelling_frees_the_blocks(run: Run) -> None:
    async def test() -> None:
        async with await start(make_args()) as engine:
            started = asyncio.Event()

            async def consume() -> None:
                async for _ in engine.generate([1] * 50, SamplingParams(max_tokens=LONG, ignore_eos=True)):
                    started.set()

            tasks = [asyncio.create_task(consume()) for _ in range(10)]
            await started.wait()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            values = await idle(engine)
            assert values["request_aborted"] == 10

    run(test())


def test_aborts_at_any_moment() -> None:
    async def test() -> None:
        async with await start(make_args()) as engine:

            async def one(i: int) -> None:
                stream = await engine.add_request([1] * (i + 1), SamplingParams(n=1 + i % 3, max_tokens=LONG))
                for _ in range(i % 4):
                    await asyncio.sleep(0.002)
                stream.close()

            await asyncio.gather(*(one(i) for i in range(60)))
            await idle(engine)
            assert (await last_of(engine, [1, 2], max_tokens=5)).finished

    asyncio.run(test())


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_output_kinds_agree(kind: RequestOutputKind) -> None:
    async def test() -> None:
        async with await start(make_args()) as engine:
            reference = await last_of(engine, [5, 6, 7], max_tokens=50, n=3, seed=1)
            ids: dict[int, list[int]] = {0: [], 1: [], 2: []}
            params = SamplingParams(max_tokens=50, n=3, seed=1, ignore_eos=True, output_kind=kind)
            async for output in engine.generate([5, 6, 7], params):
                for completion in output.outputs:
                    new = completion.token_ids
                    ids[completion.index] = (
                        ids[completion.index] + new if kind is RequestOutputKind.DELTA else new
                    )
            assert ids == {completion.index: completion.token_ids for completion in reference.outputs}

    asyncio.run(test())


def test_pause_modes() -> None:
    async def test() -> None:
        async with await start(make_args(step_us=300)) as engine:

            async def long_one(tokens: int) -> asyncio.Task[RequestOutput]:
                """A request that is running."""
                params = SamplingParams(max_tokens=tokens, seed=3, ignore_eos=True)
                stream = await engine.add_request([1, 2, 3], params)
                await stream.get()
                return asyncio.create_task(end_of(stream))

            whole = (await last_of(engine, [1, 2, 3], max_tokens=150, seed=3)).outputs[0].token_ids
            task = await long_one(LONG)
            await engine.pause_generation(mode="abort")
            assert (await task).outputs[0].finish_reason == "abort"
            waiting = asyncio.create_task(last_of(engine, [7], max_tokens=3))
            await asyncio.sleep(0.1)
            assert not waiting.done()  # queued until generation goes on
            assert await engine.is_paused()
            await engine.resume_generation()
            assert len((await waiting).outputs[0].token_ids) == 3

            task = await long_one(150)
            await engine.pause_generation(mode="wait")
            assert (await asyncio.wait_for(task, 5)).outputs[0].token_ids == whole
            await engine.resume_generation()

            for clear_cache in (False, True):
                task = await long_one(150)
                await engine.pause_generation(mode="keep", clear_cache=clear_cache)
                before = (await gauges(engine))["generation_tokens"]
                await asyncio.sleep(0.05)
                assert (await gauges(engine))["generation_tokens"] == before
                assert not task.done()
                await engine.resume_generation()
                assert (await asyncio.wait_for(task, 10)).outputs[0].token_ids == whole
            await idle(engine)

    asyncio.run(test())


def test_reset_prefix_cache() -> None:
    async def test() -> None:
        async with await start(make_args()) as engine:
            prompt = list(range(1, 100))
            await last_of(engine, prompt, max_tokens=2)
            assert (await last_of(engine, prompt, max_tokens=2)).num_cached_tokens == 96
            assert await engine.reset_prefix_cache()
            assert (await last_of(engine, prompt, max_tokens=2)).num_cached_tokens == 0

    asyncio.run(test())


def test_text_through_real_processes(tmp_path: Path) -> None:
    for name, content in make_bundle().to_files().items():
        (tmp_path / name).write_bytes(content)
    args = make_args(tokenizer=str(tmp_path), hf_overrides={"vocab_size": 700})

    async def test() -> None:
        async with await start(args) as engine, AsyncLLM.connect(engine.address) as other:
            output = await last_of(other, "The quick brown fox", max_tokens=30)
            tokenizer = await other.get_tokenizer()
            assert output.prompt_token_ids == tokenizer.encode("The quick brown fox")
            completion = output.outputs[0]
            assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)

    asyncio.run(test())


@pytest.mark.parametrize("victim", ["core", "worker 0"])
def test_a_killed_process_is_the_end_of_every_stream(victim: str, run: Run) -> None:
    async def test() -> None:
        engine = await start(make_args(step_us=1000))
        other = await AsyncLLM.connect(engine.address)
        params = SamplingParams(max_tokens=LONG, ignore_eos=True)
        streams = [await one.add_request([1, 2], params) for one in (engine, other)]
        for stream in streams:
            await stream.get()
        assert engine._processes is not None
        os.kill(engine._processes.pids[victim], signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await asyncio.wait_for(end_of(stream), 5)  # promised: 1 s
        assert engine.errored
        assert other.errored
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        await engine.aclose()
        await other.aclose()

    run(test())


def test_shutdown_leaves_nothing(run: Run) -> None:
    async def test() -> list[int]:
        engine = await start(make_args())
        assert engine._processes is not None
        pids = list(engine._processes.pids.values())
        folder = socket_path(engine.address).parent
        stream = await engine.add_request([1], SamplingParams(max_tokens=LONG))
        await engine.aclose()
        await engine.aclose()
        with pytest.raises(EngineClosedError):
            await stream.get()
        assert not folder.exists()
        return pids

    async def twice() -> None:
        for _ in range(2):
            pids = await test()
            assert not [pid for pid in pids if psutil.pid_exists(pid)]

    run(twice())
    gc.collect()
    threads, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGINT)
    run(twice())
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == fds
    assert (dict(os.environ), signal.getsignal(signal.SIGINT)) == (environment, handler)
    assert not psutil.Process().children(recursive=True)


def test_engine_made_before_the_loop_as_in_vllms_examples() -> None:
    engine = AsyncLLM.from_engine_args(make_args())
    try:

        async def main() -> None:
            assert len((await last_of(engine, [1, 2], max_tokens=4)).outputs[0].token_ids) == 4

        asyncio.run(main())
    finally:
        engine.shutdown()  # its loop is closed by now


def test_engine_that_cannot_start_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)  # where sockets go
        args = EngineArgs(device="simulated", max_model_len=8192, simulation=SimulationConfig(num_blocks=10))
        with pytest.raises(StartupError, match="max_model_len"):
            AsyncLLM.from_engine_args(args)
        assert not psutil.Process().children(recursive=True)
        assert not list(Path(folder).iterdir())
