"""What does the load generator of `tercet bench serve` cost, and how late does it see a chunk?

A server in another process streams words at set times to many connections; each word is the time of its sending,
read from the clock that all processes of a machine share. CPU time per chunk is that of the client process
alone. The same load through aiohttp with json, as load generators commonly do it, is measured beside it if
aiohttp is installed.

    python -m benchmarks.bench_load_generator --concurrency 64 --tokens 200 --gap-ms 20
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import uvloop

from tercet.bench.datasets import BenchPrompt
from tercet.bench.http_client import Server
from tercet.bench.load import LoadPlan, PlannedRequest
from tercet.bench.load_process import run_load
from tercet.bench.serve import Target

REPEATS = 3
Lags = list[float]


def bodies(args: argparse.Namespace) -> list[bytes]:
    server = Server("127.0.0.1", 1)
    target = Target(server=server, backend="openai", path="/v1/completions", model="words")
    return [target.body(BenchPrompt("x" * 1000, 1, args.tokens)) for _ in range(args.concurrency)]


async def ours(port: int, args: argparse.Namespace) -> Lags:
    """Seconds from sending to being seen, of each chunk."""
    requests = [PlannedRequest(index, 0.0, body, str(index)) for index, body in enumerate(bodies(args))]
    server = Server("127.0.0.1", port)
    plan = LoadPlan(server=server, path="/v1/completions", requests=requests, keep_text=True)
    results, _ = await run_load(plan, 1)
    assert not any(result.error for result in results)
    return [
        seen_s - float(sent)
        for result in results
        for seen_s, sent in zip(result.token_times_s, result.text.split(), strict=True)
    ]


async def with_aiohttp(port: int, args: argparse.Namespace) -> Lags:
    aiohttp: Any = importlib.import_module("aiohttp")  # a peer, none of our dependencies
    url = f"http://127.0.0.1:{port}/v1/completions"
    lags: Lags = []

    async def one(session: Any, body: bytes) -> None:
        rest = b""
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            async for data in response.content.iter_any():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    text = event.decode().removeprefix("data: ")
                    if text != "[DONE]" and (choices := json.loads(text)["choices"]):
                        lags.append(time.perf_counter() - float(choices[0]["text"]))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, body) for body in bodies(args)))
    return lags


def measure(
    client: Callable[[int, argparse.Namespace], Coroutine[Any, Any, Lags]], args: argparse.Namespace
) -> str:
    """The repeat with the least CPU time, for the machine may do other things."""
    command = [sys.executable, "-m", "benchmarks.sse_server", "--stamps", "--first-ms", "200"]
    command += ["--gap-ms", str(args.gap_ms)]
    best = (float("inf"), "")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        port = int(process.stdout.readline())
        for _ in range(REPEATS):
            start_s, cpu_s = time.perf_counter(), time.process_time()
            lags = np.array(uvloop.run(client(port, args)))
            elapsed_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
            p50, p99 = np.percentile(lags * 1e3, [50, 99])
            rate = len(lags) / elapsed_s
            per_chunk_us = cpu_s / len(lags) * 1e6
            lag = f"lag P50 {p50:.2f} ms, P99 {p99:.2f} ms"
            words = f"{per_chunk_us:.1f} us CPU per chunk, {rate:.0f} chunks/s, {lag}"
            best = min(best, (per_chunk_us, words))
        process.stdin.close()
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost and lag of the load generator.")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--gap-ms", type=float, default=20.0)
    args = parser.parse_args()
    print(f"{args.concurrency} streams of {args.tokens} chunks, {args.gap_ms:g} ms apart, best of {REPEATS}")
    print(f"tercet   {measure(ours, args)}")
    if importlib.util.find_spec("aiohttp") is None:
        print("aiohttp  not installed")
    else:
        print(f"aiohttp  {measure(with_aiohttp, args)}")


if __name__ == "__main__":
    main()
