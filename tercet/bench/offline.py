"""`tercet bench throughput` and `tercet bench latency`: an engine of one's own, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from tercet.bench.datasets import BenchPrompt, DatasetConfig, make_prompts
from tercet.errors import ConfigError
from tercet.frontend.async_llm import AsyncLLM
from tercet.frontend.inputs import PromptType
from tercet.frontend.llm import LLM
from tercet.frontend.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from tercet.frontend.tokenizer import Tokenizer
from tercet.ipc.messages import ModelInfo

PERCENTILES: Final = (10, 25, 50, 75, 90, 99)


def check_at_least(minimum: int, **values: int) -> None:
    """Raises ConfigError for the first value below the minimum, by its name."""
    for name, value in values.items():
        if value < minimum:
            raise ConfigError(name, f"must be at least {minimum}; got {value}")


# ---- throughput


class ThroughputOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How each request is generated."""

    n: int = 1
    detokenize: bool = True

    def params(self, prompt: BenchPrompt, output_kind: RequestOutputKind) -> SamplingParams:
        """Random tokens, exactly as many as asked for."""
        return SamplingParams(
            n=self.n,
            temperature=1.0,
            max_tokens=prompt.output_len,
            ignore_eos=True,
            detokenize=self.detokenize,
            output_kind=output_kind,
        )


def engine_prompts(config: DatasetConfig, tokenizer: Tokenizer | None, model: ModelInfo) -> list[BenchPrompt]:
    """The dataset for an engine; synthetic prompts are token ids where it has no tokenizer.

    Raises:
        ConfigError: as `make_prompts`, or a request is longer than the model's context.
    """
    _check_context(config.nominal_len, model)  # before the work of making them
    if tokenizer is None and config.path is None and config.random_vocab_size is None:
        config = msgspec.structs.replace(config, random_vocab_size=model.vocab_size)
    prompts = make_prompts(config, tokenizer)
    _check_context(max((prompt.prompt_len or 0) + prompt.output_len for prompt in prompts), model)
    return prompts


def _check_context(length: int, model: ModelInfo) -> None:
    if length > model.max_model_len:
        raise ConfigError(
            "input_len", f"prompt and answer of {length} tokens exceed max_model_len {model.max_model_len}"
        )


def run_sync(
    llm: LLM, prompts: Sequence[BenchPrompt], options: ThroughputOptions, *, show_progress: bool
) -> tuple[float, int, int]:
    """All prompts through `LLM.generate`: seconds, prompt tokens and output tokens."""
    params = [options.params(prompt, RequestOutputKind.FINAL_ONLY) for prompt in prompts]
    start_s = time.perf_counter()
    outputs = llm.generate([prompt.prompt for prompt in prompts], params, use_tqdm=show_progress)
    elapsed_s = time.perf_counter() - start_s
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return elapsed_s, num_prompt_tokens, num_output_tokens


async def run_async(
    engine: AsyncLLM,
    prompts: Sequence[BenchPrompt],
    options: ThroughputOptions,
    on_progress: Callable[[int], object],
) -> tuple[float, int, int]:
    """All prompts at once through `AsyncLLM.generate`, each token streamed: as `run_sync`."""

    async def one(prompt: BenchPrompt) -> tuple[int, int]:
        num_prompt_tokens = num_output_tokens = 0
        async for output in engine.generate(prompt.prompt, options.params(prompt, RequestOutputKind.DELTA)):
            num_prompt_tokens = len(output.prompt_token_ids)
            num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        on_progress(1)
        return num_prompt_tokens, num_output_tokens

    start_s = time.perf_counter()
    counts = await asyncio.gather(*map(one, prompts))
    elapsed_s = time.perf_counter() - start_s
    return elapsed_s, sum(count for count, _ in counts), sum(count for _, count in counts)


def throughput_result(
    num_requests: int, elapsed_s: float, num_prompt_tokens: int, num_output_tokens: int
) -> dict[str, Any]:
    """vLLM's JSON keys, and the two token counts apart."""
    total = num_prompt_tokens + num_output_tokens
    return {
        "elapsed_time": elapsed_s,
        "num_requests": num_requests,
        "total_num_tokens": total,
        "requests_per_second": num_requests / elapsed_s,
        "tokens_per_second": total / elapsed_s,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": num_output_tokens,
    }


def throughput_text(result: dict[str, Any]) -> str:
    """The figures as vLLM prints them."""
    output_rate = result["num_output_tokens"] / result["elapsed_time"]
    return (
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, {output_rate:.2f} output tokens/s\n"
        f"Total num prompt tokens:  {result['num_prompt_tokens']}\n"
        f"Total num output tokens:  {result['num_output_tokens']}"
    )


# ---- latency


class LatencyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One batch of equal requests, again and again."""

    input_len: int = 32
    output_len: int = 128
    batch_size: int = 8
    n: int = 1
    use_beam_search: bool = False
    detokenize: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(
            1, input_len=self.input_len, output_len=self.output_len, batch_size=self.batch_size, n=self.n
        )


class LatencyRun:
    """The batch on an engine; `once` gives its latency in seconds."""

    def __init__(self, llm: LLM, options: LatencyOptions) -> None:
        """
        Raises:
            ConfigError: the requests are longer than the model's context.
        """
        model = llm.model_info
        _check_context(options.input_len + options.output_len, model)
        rng = np.random.default_rng(options.seed)
        tokens = rng.integers(0, model.vocab_size, (options.batch_size, options.input_len)).tolist()
        self._llm = llm
        self._options = options
        self._prompts: list[PromptType] = [{"prompt_token_ids": row} for row in tokens]

    def once(self) -> float:
        start_s = time.perf_counter()
        options = self._options
        if options.use_beam_search:
            beam = BeamSearchParams(beam_width=options.n, max_tokens=options.output_len, ignore_eos=True)
            self._llm.beam_search(self._prompts, beam)
        else:
            params = SamplingParams(
                n=options.n,
                temperature=1.0,
                max_tokens=options.output_len,
                ignore_eos=True,
                detokenize=options.detokenize,
            )
            self._llm.generate(self._prompts, params, use_tqdm=False)
        return time.perf_counter() - start_s


def latency_result(latencies_s: Sequence[float]) -> dict[str, Any]:
    """vLLM's JSON keys, in seconds."""
    return {
        "avg_latency": float(np.mean(latencies_s)),
        "latencies": list(latencies_s),
        "percentiles": {str(one): float(np.percentile(latencies_s, one)) for one in PERCENTILES},
    }


def latency_text(result: dict[str, Any]) -> str:
    """The figures as vLLM prints them."""
    lines = [f"Avg latency: {result['avg_latency']} seconds"]
    lines += [f"{name}% percentile latency: {value} seconds" for name, value in result["percentiles"].items()]
    return "\n".join(lines)
