"""What does turning a streamed token into text cost: one token to each of 256 streams, stop strings included?

One round is 16 steps of the engine: in each, every stream takes its next token and returns the text to show.
The cost per token is printed; the budget of the whole frontend, delivery included, is 3 µs. The text is
English with some other scripts, encoded by SmolLM2's tokenizer, so that characters of several tokens occur.

    python -m pytest benchmarks/bench_detokenize.py --benchmark-columns=median,iqr,ops
"""

import itertools
from collections.abc import Callable, Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tercet.frontend.detokenizer import DetokenizerFactory
from tercet.frontend.stop_strings import OutputText
from tercet.frontend.tokenizer import Tokenizer, load_bundle
from tests.frontend.tokenizer_zoo import smollm2_gguf

NUM_STREAMS = 256
STEPS_PER_ROUND = 16
TEXT = (
    "The quick brown fox jumps over the lazy dog; in 1984 it cost $3.14, they said. "
    "Größe, naïve café, 你好世界, ภาษาไทย 🙂🙃.\n\n    def f(x):\n        return x + 1  # and so on\n"
)
STOPS: dict[str, tuple[str, ...]] = {
    "no stop strings": (),
    "two that never begin": ("~~~", "^^^"),
    "two that often begin": ("the end", "\n\n\n"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(load_bundle(smollm2_gguf()))


def _tokens(token_ids: list[int], stream: int) -> Iterator[int]:
    """The text over and over, each stream at another place of it."""
    start = stream * 7 % len(token_ids)
    return itertools.cycle(token_ids[start:] + token_ids[:start])


def _report_per_token(benchmark: BenchmarkFixture, tokens_per_round: int) -> None:
    benchmark.extra_info["tokens_per_round"] = tokens_per_round
    if benchmark.stats is not None:  # absent under --benchmark-disable
        median_us = benchmark.stats.stats.median / tokens_per_round * 1e6
        benchmark.extra_info["us_per_token"] = round(median_us, 3)
        print(f"\n{benchmark.name}: {median_us:.2f} µs per token")


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_one_token_to_each_stream(
    benchmark: BenchmarkFixture, tokenizer: Tokenizer, stop: tuple[str, ...]
) -> None:
    prompt = tokenizer.encode(TEXT)
    factory = DetokenizerFactory(tokenizer)

    def setup() -> tuple[tuple[list[OutputText], list[list[int]]], dict[str, object]]:
        outputs = [OutputText(factory.create(prompt_token_ids=prompt), stop) for _ in range(NUM_STREAMS)]
        streams = [_tokens(prompt, stream) for stream in range(NUM_STREAMS)]
        return (outputs, [[next(tokens) for tokens in streams] for _ in range(STEPS_PER_ROUND)]), {}

    def run(outputs: list[OutputText], steps: list[list[int]]) -> None:
        for step in steps:
            for output, token_id in zip(outputs, step, strict=True):
                output.push_token(token_id)

    benchmark.pedantic(run, setup=setup, rounds=30, warmup_rounds=3)  # type: ignore[no-untyped-call]
    _report_per_token(benchmark, NUM_STREAMS * STEPS_PER_ROUND)


@pytest.mark.parametrize("num_prompt_tokens", [16, 1024, 131_072])
def test_new_request(benchmark: BenchmarkFixture, tokenizer: Tokenizer, num_prompt_tokens: int) -> None:
    """Making a request's detokenizer must not grow with its prompt."""
    prompt = (tokenizer.encode(TEXT) * num_prompt_tokens)[:num_prompt_tokens]
    create: Callable[..., object] = DetokenizerFactory(tokenizer).create
    benchmark(create, prompt_token_ids=prompt)


@pytest.mark.parametrize("num_tokens", [1, 16, 256])
def test_unread_tokens_merged_into_one_push(
    benchmark: BenchmarkFixture, tokenizer: Tokenizer, num_tokens: int
) -> None:
    """A slow consumer's tokens are detokenized together."""
    token_ids = (tokenizer.encode(TEXT) * num_tokens)[:num_tokens]
    output = OutputText(DetokenizerFactory(tokenizer).create())
    benchmark(output.push, token_ids)
    _report_per_token(benchmark, num_tokens)
