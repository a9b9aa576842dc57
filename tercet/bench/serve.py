"""`tercet bench serve`: a benchmark of a server, from dataset to figures."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from tercet.bench.arrivals import RampUp, arrival_offsets
from tercet.bench.datasets import BenchPrompt
from tercet.bench.http_client import HttpError, Server, get
from tercet.bench.load import Generator, LoadPlan, PlannedRequest
from tercet.bench.load_process import run_load
from tercet.bench.metrics import Sample, Selection, serving_result
from tercet.bench.stream import RequestResult
from tercet.errors import ConfigError, TercetError

if TYPE_CHECKING:
    from tercet.frontend.tokenizer import Tokenizer

ENDPOINTS: Final = {
    "openai": "/v1/completions",
    "vllm": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
"""Backend -> its endpoint. 'vllm' is vLLM's other name for 'openai'."""
_READY_INTERVAL_S: Final = 1.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured, and how its requests look.

    Attributes:
        backend: a key of ENDPOINTS.
        path: of the endpoint on the server.
        model: name sent in each request.
        extra_body: entries of every request's body, over those that this module makes.
    """

    server: Server
    backend: str
    path: str
    model: str
    ignore_eos: bool = False
    logprobs: int | None = None
    extra_body: dict[str, Any] = {}

    @property
    def is_chat(self) -> bool:
        return self.backend == "openai-chat"

    def body(self, prompt: BenchPrompt) -> bytes:
        """A request's body in JSON."""
        fields: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.is_chat:
            fields["messages"] = [{"role": "user", "content": prompt.prompt}]
            fields["max_completion_tokens"] = prompt.output_len
            if self.logprobs is not None:
                fields |= {"logprobs": True, "top_logprobs": self.logprobs}
        else:
            fields["prompt"] = prompt.prompt
            fields["max_tokens"] = prompt.output_len
            if self.logprobs is not None:
                fields["logprobs"] = self.logprobs
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode({**fields, **self.extra_body})


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """How requests arrive in one run."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up: RampUp | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError("max_concurrency", f"must be at least 1; got {self.max_concurrency}")
        if self.ramp_up is not None and math.isfinite(self.request_rate):
            raise ConfigError("request_rate", "leave it out: the ramp-up gives the rate")
        arrival_offsets(0, self.request_rate, self.burstiness, self.seed)  # checks rate and burstiness


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a run is made, apart from its traffic."""

    num_client_processes: int = 1
    num_warmups: int = 0
    keep_text: bool = False
    request_id_prefix: str = "bench-"


class _ModelCard(msgspec.Struct):
    id: str
    root: str | None = None


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


async def first_model(server: Server, path_prefix: str) -> tuple[str, str]:
    """Name and source (vLLM's `root`) of the first model that the server lists.

    Raises:
        TercetError: the server does not answer, or lists none.
    """
    path = f"{path_prefix}/v1/models"
    try:
        status, body = await get(server, path)
        if status != 200:
            raise TercetError(f"GET {path}: HTTP {status}: {body[:200].decode('utf-8', 'replace')}")
        models = msgspec.json.decode(body, type=_ModelList).data
    except (HttpError, msgspec.MsgspecError) as error:
        raise TercetError(
            f"GET {path}: {error}; is the server up? --model names one without asking"
        ) from None
    if not models:
        raise TercetError(f"GET {path}: the server lists no model; name one with --model")
    return models[0].id, models[0].root or models[0].id


async def wait_until_ready(target: Target, prompt: BenchPrompt, timeout_s: float) -> None:
    """Send one prompt until it succeeds.

    Raises:
        TercetError: it has not within the time.
    """
    deadline_s = time.monotonic() + timeout_s
    while error := (await _run_once(target, [prompt]))[0].error:
        if time.monotonic() + _READY_INTERVAL_S > deadline_s:
            raise TercetError(f"the endpoint is not ready after {timeout_s:g} s: {error}")
        await asyncio.sleep(_READY_INTERVAL_S)


async def _run_once(target: Target, prompts: Sequence[BenchPrompt]) -> list[RequestResult]:
    requests = [
        PlannedRequest(index, 0.0, target.body(prompt), f"warmup-{index}")
        for index, prompt in enumerate(prompts)
    ]
    plan = LoadPlan(server=target.server, path=target.path, requests=requests)
    return await Generator(plan).run(time.perf_counter())


async def benchmark(
    target: Target,
    prompts: Sequence[BenchPrompt],
    traffic: Traffic,
    selection: Selection,
    options: RunOptions,
    tokenizer: Tokenizer | None,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """One run: its figures under vLLM's JSON keys, see `metrics.serving_result`.

    Args:
        prompts: one for each request, in order.
        tokenizer: counts tokens of answers whose server sends no usage; without it chunks are counted.

    Raises:
        TercetError: a warm-up failed, or a client process.
    """
    if options.num_warmups:
        warmups = [prompts[index % len(prompts)] for index in range(options.num_warmups)]
        for result in await _run_once(target, warmups):
            if not result.success:
                raise TercetError(f"a warm-up request failed: {result.error}")
    offsets = arrival_offsets(
        len(prompts), traffic.request_rate, traffic.burstiness, traffic.seed, traffic.ramp_up
    )
    plan = LoadPlan(
        server=target.server,
        path=target.path,
        requests=[
            PlannedRequest(index, offset_s, target.body(prompt), f"{options.request_id_prefix}{index}")
            for index, (prompt, offset_s) in enumerate(zip(prompts, offsets, strict=True))
        ],
        max_concurrency=traffic.max_concurrency,
        keep_text=options.keep_text,
    )
    results, start_s = await run_load(plan, options.num_client_processes, on_progress)
    samples = [_sample(*pair, tokenizer) for pair in zip(prompts, results, strict=True)]
    return serving_result(
        samples,
        start_s,
        selection,
        request_rate=traffic.request_rate,
        max_concurrency=traffic.max_concurrency,
    )


def _sample(prompt: BenchPrompt, result: RequestResult, tokenizer: Tokenizer | None) -> Sample:
    prompt_len = prompt.prompt_len if prompt.prompt_len is not None else result.prompt_tokens or 0
    if not result.success:
        return Sample(prompt_len, 0, result)
    output_len = result.output_tokens
    if output_len is None and tokenizer is not None:
        output_len = len(tokenizer.encode(result.text, add_special_tokens=False))
    return Sample(prompt_len, output_len or len(result.token_times_s), result)


def default_headers() -> dict[str, str]:
    """The key of the OpenAI client's environment variable, as a header."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def first_errors(result: dict[str, Any], limit: int = 3) -> Iterator[str]:
    """What went wrong in a run, each problem once."""
    seen: dict[str, int] = {}
    for error in filter(None, result["errors"]):
        seen[error] = seen.get(error, 0) + 1
    for error, count in sorted(seen.items(), key=lambda item: -item[1])[:limit]:
        yield f"{count} × {error}"
