"""Load generators in processes of their own, for more load than one core can make.

Each is `python -m tercet.bench.load_process` and talks on its stdin and stdout in frames: four bytes of length,
big-endian, and MessagePack. In: a LoadPlan, then the time to start (`time.perf_counter()`, one clock for the
machine). Out: _READY, numbers of requests that have ended since the last such number, then the results.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import uvloop

from tercet.bench.load import Generator, LoadPlan, undisturbed
from tercet.bench.stream import RequestResult
from tercet.errors import TercetError

PROGRESS_INTERVAL_S: Final = 0.2
START_DELAY_S: Final = 0.05  # between the order to start and the start, for the order to arrive
_READY: Final = -1
_LENGTH: Final = struct.Struct(">I")
_LENGTH_LIMIT: Final = 1 << 32


async def run_load(
    plan: LoadPlan, num_processes: int, on_progress: Callable[[int], None] = lambda num_done: None
) -> tuple[list[RequestResult], float]:
    """Carry out a plan with some processes; 1 is the calling one.

    Requests are dealt out in turn, and max_concurrency is shared out evenly.

    Args:
        on_progress: told how many more requests have ended.

    Returns: the results in the plan's order, and when the run started (`time.perf_counter()`).

    Raises:
        TercetError: a process failed.
    """
    if num_processes == 1:
        start_s = time.perf_counter()
        generator = Generator(plan, lambda result: on_progress(1))
        with undisturbed():
            return await generator.run(start_s), start_s
    plans = split(plan, num_processes)
    children = [await _Child.start() for _ in plans]
    try:
        for child, part in zip(children, plans, strict=True):
            child.send(part)
        await asyncio.gather(*(child.wait_ready() for child in children))
        start_s = time.perf_counter() + START_DELAY_S
        for child in children:
            child.send(start_s)
        parts = await asyncio.gather(*(child.results(on_progress) for child in children))
    finally:
        for child in children:
            await child.end()
    results = sorted((result for part in parts for result in part), key=lambda result: result.index)
    return results, start_s


def split(plan: LoadPlan, num_processes: int) -> list[LoadPlan]:
    """The plan in parts; fewer than asked for where there is not one request, or place, for each."""
    limit = plan.max_concurrency
    num_parts = max(1, min(num_processes, len(plan.requests), limit or num_processes))
    return [
        msgspec.structs.replace(
            plan,
            requests=plan.requests[part::num_parts],
            max_concurrency=None if limit is None else limit // num_parts + (part < limit % num_parts),
        )
        for part in range(num_parts)
    ]


class _Child:
    """The parent's end of one process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout

    @classmethod
    async def start(cls) -> _Child:
        command = [sys.executable, "-m", "tercet.bench.load_process"]
        pipe = asyncio.subprocess.PIPE
        return cls(await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe))

    def send(self, value: object) -> None:
        """Without waiting: the reader reads all of it before it does anything else."""
        self._stdin.write(_frame(value))

    async def wait_ready(self) -> None:
        if await self._receive(int) != _READY:
            raise TercetError("a client process does not say that it is ready")

    async def results(self, on_progress: Callable[[int], None]) -> list[RequestResult]:
        while True:
            value: int | list[RequestResult] = await self._receive(int | list[RequestResult])
            if not isinstance(value, int):
                return value
            on_progress(value)

    async def _receive(self, kind: Any) -> Any:
        try:
            return await _read_frame(self._stdout, kind)
        except asyncio.IncompleteReadError:
            code = await self._process.wait()
            raise TercetError(f"a client process ended with exit code {code}; see its words above") from None

    async def end(self) -> None:
        """It leaves when its stdin ends."""
        self._stdin.close()
        if self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), 5.0)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


def _frame(value: object) -> bytes:
    data = msgspec.msgpack.encode(value)
    if len(data) >= _LENGTH_LIMIT:
        raise TercetError("num_prompts: prompts or results of one client process exceed 4 GiB")
    return _LENGTH.pack(len(data)) + data


async def _read_frame(reader: asyncio.StreamReader, kind: Any) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return msgspec.msgpack.decode(await reader.readexactly(length), type=kind)


# ---- the process itself


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    plan: LoadPlan = await _read_frame(reader, LoadPlan)
    with undisturbed():
        _write(_READY)
        start_s: float = await _read_frame(reader, float)
        watch = asyncio.create_task(_leave_with_parent(reader))
        num_done = 0

        def count(result: RequestResult) -> None:
            nonlocal num_done
            num_done += 1

        running = asyncio.create_task(Generator(plan, count).run(start_s))
        while not running.done():
            await asyncio.wait([running], timeout=PROGRESS_INTERVAL_S)
            _write(num_done)
            num_done = 0
        results = await running
    watch.cancel()
    _write(results)


async def _leave_with_parent(reader: asyncio.StreamReader) -> None:
    """The parent closes the pipe, or ends: in either case nobody wants the results."""
    await reader.read()
    os._exit(1)


def _write(value: object) -> None:
    data = memoryview(_frame(value))
    while data:  # a pipe takes what fits
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    try:
        uvloop.run(_serve())
    except (KeyboardInterrupt, asyncio.IncompleteReadError):  # the parent reports
        sys.exit(1)
