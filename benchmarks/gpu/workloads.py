"""The workloads W1–W5 and a sweep over batch sizes, through `LLM` and `AsyncLLM` only.

Prompts are random token ids, fresh in every run, so that none is found in the prefix cache; every request ignores
eos and asks for no text. Each workload is a list of `Case`s; calling a case's `run` does the whole workload once and
returns its figures.

    W1  256 requests, prompt and output lengths uniform in [100, 1024], temperature 0.6: output tokens a second
    W2  one request, 128/256 tokens, greedy: time to first token; ms per token after the first
    W3  64, then 256 requests at once, 128/256, greedy: ms per decode step, output tokens a second
    W4  16 prompts of 4096 tokens, one output token each: input tokens a second
    W5  AsyncLLM, DELTA streams, 256/256, temperature 0.6: 512 requests at concurrency 256, then 16 and 1
    sweep  as W3 with 128/128 tokens over batch sizes

Times of W2 and W3 are the engine's own `RequestOutput.metrics`, taken where a frontend gets tokens: arrival to
first token, arrival to end. A decode step of W3 is (last end − last first token) / (outputs − 1). Times of W5 are
the consumer's clock around its `async for`: an inter-token latency (ITL) is the time between two outputs of a stream.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import numpy as np

from benchmarks.gpu.peers import INPUT, ITL50, ITL99, OUTPUT, STEP, TOKEN, TTFT, TTFT50, TTFT99
from benchmarks.gpu.results import Figures
from tercet import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams, TokensPrompt

MAX_ID = 10_000  # prompts are of ids [0, MAX_ID], as far as the vocabulary goes


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `FULL` is what the workloads are defined by."""

    w1_requests: int = 256
    w1_lengths: tuple[int, int] = (100, 1024)
    w1_runs: int = 2
    prompt: int = 128  # W2, W3
    output: int = 256
    w2_runs: int = 5
    w3_batches: tuple[int, ...] = (64, 256)
    w3_runs: int = 3
    w4: tuple[int, int] = (16, 4096)
    w4_runs: int = 3
    w5_lengths: tuple[int, int] = (256, 256)
    w5_levels: tuple[tuple[int, int, int], ...] = (
        (256, 512, 2),
        (16, 96, 2),
        (1, 4, 2),
    )  # at once, in all, runs
    sweep_batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    sweep_output: int = 128


FULL = Sizes()
TINY = Sizes(
    w1_requests=6,
    w1_lengths=(4, 12),
    prompt=8,
    output=8,
    w2_runs=2,
    w3_batches=(2, 4),
    w3_runs=1,
    w4=(2, 40),
    w4_runs=1,
    w5_lengths=(8, 6),
    w5_levels=((4, 8, 1), (2, 4, 1), (1, 2, 1)),
    sweep_batches=(1, 2, 4),
    sweep_output=6,
)
OFFLINE = ("W1", "W2", "W3", "W4", "sweep")
SERVING = ("W5",)


@dataclass(frozen=True)
class Case:
    """Something to run several times. `run(number)` does it once; the number makes its prompts fresh."""

    workload: str
    name: str
    what: str
    runs: int
    run: Callable[[int], Figures]
    batch: int | None = None


def offline_cases(workload: str, llm: LLM, sizes: Sizes) -> list[Case]:
    """Cases of a workload that uses `LLM`."""
    match workload:
        case "W1":
            return [_w1(llm, sizes)]
        case "W2":
            return [_w2(llm, sizes)]
        case "W3":
            return [
                _at_once("W3", llm, batch, sizes.prompt, sizes.output, sizes.w3_runs)
                for batch in sizes.w3_batches
            ]
        case "W4":
            return [_w4(llm, sizes)]
        case "sweep":
            return [
                _at_once("sweep", llm, batch, sizes.prompt, sizes.sweep_output, 1)
                for batch in sizes.sweep_batches
            ]
    raise ValueError(f"{workload!r} is no workload of LLM; there are {', '.join(OFFLINE)}")


def serving_cases(
    engine: AsyncLLM, sizes: Sizes, run: Callable[[Coroutine[None, None, Figures]], Figures]
) -> list[Case]:
    """The cases of W5.

    Args:
        run: runs a coroutine on the engine's event loop.
    """

    def make(level: tuple[int, int, int]) -> Case:
        at_once, count, runs = level
        prompt, output = sizes.w5_lengths
        return Case(
            "W5",
            str(at_once),
            f"{count} requests at concurrency {at_once}, {prompt}/{output}, T 0.6, DELTA",
            runs,
            lambda number: run(_serve(engine, at_once, count, sizes.w5_lengths, number)),
            batch=at_once,
        )

    return [make(level) for level in sizes.w5_levels]


def random_prompts(lengths: list[int], vocab: int, workload: str, *run: int) -> list[TokensPrompt]:
    """Prompts of these lengths, of ids that no other workload and run has."""
    rng = np.random.default_rng([*workload.encode(), *run])
    high = min(MAX_ID + 1, vocab)
    return [TokensPrompt(prompt_token_ids=rng.integers(0, high, length).tolist()) for length in lengths]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


# ---------------------------------------------------------------------------------------------- LLM


def _w1(llm: LLM, sizes: Sizes) -> Case:
    low, high = sizes.w1_lengths
    last = min(MAX_ID, llm.model_info.vocab_size - 1)
    rng = random.Random(0)
    prompts = [
        TokensPrompt(prompt_token_ids=[rng.randint(0, last) for _ in range(rng.randint(low, high))])
        for _ in range(sizes.w1_requests)
    ]
    counts = [rng.randint(low, high) for _ in range(sizes.w1_requests)]
    params = [
        SamplingParams(temperature=0.6, max_tokens=n, ignore_eos=True, detokenize=False) for n in counts
    ]

    def run(number: int) -> Figures:
        _forget_prefixes(llm)  # the lengths are drawn with the ids: every run has the same prompts
        outputs, wall_s = _generate(llm, prompts, params)
        return {OUTPUT: _count(outputs) / wall_s}

    total_in = sum(len(prompt["prompt_token_ids"]) for prompt in prompts)
    what = f"{len(prompts)} requests, {total_in:,} tokens in, {sum(counts):,} out, T 0.6"
    return Case("W1", "", what, sizes.w1_runs, run)


def _forget_prefixes(llm: LLM) -> None:
    """Empty the prefix cache; a step in flight may hold the last blocks for a moment. Raises RuntimeError."""
    for _ in range(200):
        if llm.reset_prefix_cache():
            return
        time.sleep(0.01)
    raise RuntimeError("the prefix cache does not get empty")


def _w2(llm: LLM, sizes: Sizes) -> Case:
    def run(number: int) -> Figures:
        prompts = random_prompts([sizes.prompt], llm.model_info.vocab_size, "W2", number)
        (output,), _ = _generate(llm, prompts, greedy(sizes.output))
        first_s, end_s = _times(output)
        return {TOKEN: (end_s - first_s) / (sizes.output - 1) * 1e3, TTFT: first_s * 1e3}

    return Case("W2", "", f"one request {sizes.prompt}/{sizes.output}, greedy", sizes.w2_runs, run, batch=1)


def _at_once(workload: str, llm: LLM, batch: int, prompt: int, output: int, runs: int) -> Case:
    def run(number: int) -> Figures:
        prompts = random_prompts([prompt] * batch, llm.model_info.vocab_size, workload, batch, number)
        outputs, wall_s = _generate(llm, prompts, greedy(output))
        first = [_arrival(o) + _times(o)[0] for o in outputs]
        end = [_arrival(o) + _times(o)[1] for o in outputs]
        return {
            STEP: (max(end) - max(first)) / (output - 1) * 1e3,
            OUTPUT: _count(outputs) / wall_s,
            TTFT50: float(np.median([_times(o)[0] for o in outputs])) * 1e3,
        }

    what = f"{batch} requests at once, {prompt}/{output}, greedy"
    return Case(workload, str(batch), what, runs, run, batch=batch)


def _w4(llm: LLM, sizes: Sizes) -> Case:
    count, length = sizes.w4

    def run(number: int) -> Figures:
        prompts = random_prompts([length] * count, llm.model_info.vocab_size, "W4", number)
        _, wall_s = _generate(llm, prompts, greedy(1))
        return {INPUT: count * length / wall_s}

    return Case("W4", "", f"{count} prompts of {length}, one output token each", sizes.w4_runs, run)


def _generate(
    llm: LLM, prompts: list[TokensPrompt], params: SamplingParams | list[SamplingParams]
) -> tuple[list[RequestOutput], float]:
    """Outputs, and seconds from the call to its return. Raises RuntimeError where tokens are missing."""
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    wall_s = time.perf_counter() - started
    all_params = params if isinstance(params, list) else [params] * len(prompts)
    for output, one in zip(outputs, all_params, strict=True):
        if len(output.outputs[0].token_ids) != one.max_tokens or output.num_cached_tokens:
            raise RuntimeError(
                "a request ended early, or found its prompt in the cache: no valid measurement"
            )
    return outputs, wall_s


def _count(outputs: list[RequestOutput]) -> int:
    return sum(len(output.outputs[0].token_ids) for output in outputs)


def _arrival(output: RequestOutput) -> float:
    assert output.metrics is not None
    return output.metrics.arrival_time


def _times(output: RequestOutput) -> tuple[float, float]:
    """Seconds from arrival to first token, and to the end."""
    assert output.metrics is not None
    return output.metrics.first_token_latency, output.metrics.e2e_latency


# ----------------------------------------------------------------------------------------- AsyncLLM


async def _serve(
    engine: AsyncLLM, at_once: int, count: int, lengths: tuple[int, int], number: int
) -> Figures:
    """`count` requests by `at_once` consumers, each of which asks again as soon as it was answered."""
    prompt, output = lengths
    waiting = random_prompts([prompt] * count, engine.model_info.vocab_size, "W5", at_once, number)
    params = SamplingParams(
        temperature=0.6,
        max_tokens=output,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    stamps: list[list[float]] = []

    async def consume() -> None:
        while waiting:
            stamps.append(await _stream(engine, waiting.pop(), params))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(consume())
    wall_s = time.perf_counter() - started
    first_ms = np.array([times[1] - times[0] for times in stamps]) * 1e3
    between_ms = np.concatenate([np.diff(times[1:]) for times in stamps]) * 1e3
    per_token_ms = np.mean([(times[-1] - times[1]) / (output - 1) for times in stamps]) * 1e3
    return {
        OUTPUT: count * output / wall_s,
        TTFT50: float(np.percentile(first_ms, 50)),
        TTFT99: float(np.percentile(first_ms, 99)),
        ITL50: float(np.percentile(between_ms, 50)),
        ITL99: float(np.percentile(between_ms, 99)),
        TOKEN: float(per_token_ms),
    }


async def _stream(engine: AsyncLLM, prompt: TokensPrompt, params: SamplingParams) -> list[float]:
    """When the request was made, then when each output came."""
    stamps = [time.perf_counter()]
    count = 0
    async for output in engine.generate(prompt, params):
        stamps.append(time.perf_counter())
        count += len(output.outputs[0].token_ids)
    if count != params.max_tokens:
        raise RuntimeError(f"a stream gave {count} tokens instead of {params.max_tokens}")
    return stamps
