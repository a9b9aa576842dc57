"""A process that forks while it has an engine: the child leaves the parent's engine alone, and never waits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PARENT = """
import asyncio, gc, os, signal, sys, threading, time
import psutil
from tercet import LLM, AsyncEngineArgs, AsyncLLM, EngineClosedError, SamplingParams

PROMPT = [1, 2, 3]
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)


def wait_for(pid):
    # The child's exit code; a child that hangs is killed.
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    sys.exit("the child hangs")


def raises_closed(function):
    try:
        function()
    except EngineClosedError as error:
        assert "another process" in str(error) and "AsyncLLM.connect" in str(error), error
    else:
        raise AssertionError("no error")


async def generate(engine):
    async for output in engine.generate(PROMPT, PARAMS):
        last = output
    return last


def check_left():
    assert not psutil.Process().children(recursive=True)
    assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
    print("nothing left")
"""

WITH_LLM = """
engine = LLM(device="simulated")
if {generate_before}:
    engine.generate(PROMPT, PARAMS, use_tqdm=False)
if (pid := os.fork()) == 0:
    {in_child}
    sys.exit(7)
assert wait_for(pid) == 7
for _ in range(3):
    assert len(engine.generate(PROMPT, PARAMS, use_tqdm=False)[0].outputs[0].token_ids) == 5
engine.shutdown()
check_left()
"""

WITH_ASYNC_LLM = """
engine = AsyncLLM.from_engine_args(AsyncEngineArgs(device="simulated"))
if (pid := os.fork()) == 0:
    {in_child}
    sys.exit(7)
assert wait_for(pid) == 7

async def main():
    assert len((await generate(engine)).outputs[0].token_ids) == 5
    await engine.aclose()

asyncio.run(main())
check_left()
"""

WITH_RUNNING_LOOP = """
async def main():
    engine = await asyncio.to_thread(
        AsyncLLM.from_engine_args, AsyncEngineArgs(device="simulated")
    )
    await generate(engine)
    # As a library would from a coroutine: the child must not return to the parent's event loop.
    if (pid := os.fork()) == 0:
        try:
            {in_child}
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(7)
    assert await asyncio.to_thread(wait_for, pid) == 7
    assert len((await generate(engine)).outputs[0].token_ids) == 5
    await engine.aclose()

asyncio.run(main())
check_left()
"""

USE_ASYNC_LLM = """
    raises_closed(lambda: asyncio.run(engine.start()))
    raises_closed(lambda: asyncio.run(generate(engine)))
    raises_closed(lambda: asyncio.run(engine.check_health()))
    raises_closed(lambda: asyncio.run(engine.abort("x")))
    raises_closed(lambda: asyncio.run(engine.get_metrics()))
    raises_closed(lambda: engine.model_info)
    raises_closed(engine.get_num_unfinished_requests)
    assert not engine.is_running and not engine.errored
"""

USE_LLM = """
    raises_closed(lambda: engine.generate(PROMPT, PARAMS, use_tqdm=False))
    raises_closed(lambda: engine.generate(PROMPT, use_tqdm=False))
    raises_closed(lambda: engine.model_info)
    raises_closed(engine.get_tokenizer)
    raises_closed(engine.get_metrics)
    raises_closed(engine.reset_prefix_cache)
"""

CONNECT = """
    async def attached():
        async with AsyncLLM.connect(engine.address) as own:
            assert len((await generate(own)).outputs[0].token_ids) == 5
    asyncio.run(attached())
"""

ENDS = {
    "exit": "pass",
    "del": "del engine; gc.collect()",
    "shutdown": "engine.shutdown(); engine.shutdown()",
    "aclose": "asyncio.run(engine.aclose())",
    "connect": CONNECT,
}


def run(program: str) -> None:
    """Run a program that ends by itself and leaves no file in its temporary directory."""
    with tempfile.TemporaryDirectory() as folder:  # short: the path of a socket must fit
        done = subprocess.run(
            [sys.executable, "-c", PARENT + program],
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "nothing left\n", done.stdout + done.stderr
        assert "Exception ignored" not in done.stderr, done.stderr
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("generate_before", [False, True])
@pytest.mark.parametrize("end", ["exit", "del", "shutdown", "connect"])
def test_llm_survives_its_child(end: str, generate_before: bool) -> None:
    run(WITH_LLM.format(in_child=ENDS[end], generate_before=generate_before))


def test_llm_raises_in_the_child() -> None:
    run(WITH_LLM.format(in_child=USE_LLM, generate_before=True))


@pytest.mark.parametrize("end", list(ENDS))
def test_async_llm_survives_its_child(end: str) -> None:
    run(WITH_ASYNC_LLM.format(in_child=ENDS[end]))


def test_async_llm_raises_in_the_child() -> None:
    run(WITH_ASYNC_LLM.format(in_child=USE_ASYNC_LLM))


@pytest.mark.parametrize("end", ["del engine; gc.collect()", "engine.shutdown()"])
def test_fork_in_a_coroutine(end: str) -> None:
    run(WITH_RUNNING_LOOP.format(in_child=end))


def test_inherited_engine_dropped_while_another_is_attached() -> None:
    """The child's own connection is unharmed when the inherited object goes."""
    both = CONNECT.replace("as own:", "as own:\n            engine.shutdown()")
    run(WITH_ASYNC_LLM.format(in_child=both))
