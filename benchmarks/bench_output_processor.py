"""What a streamed token costs a frontend: one step of its requests, from StepOutputs to their consumers.

Per mode the whole way: the message's columns are applied, the consumer tasks (`async for`) wake on an event loop
and each fetches its RequestOutput. Decoding the message from its frames is `bench_codec.py`'s. `extra_info` has
µs per token; waking a task and letting it wait again takes about a third. Run: `make bench`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tokenizers
import uvloop
from tokenizers import decoders, models, pre_tokenizers

from tercet.frontend.input_processor import InputProcessor
from tercet.frontend.inputs import parse_prompt
from tercet.frontend.output_processor import OutputProcessor
from tercet.frontend.sampling_params import RequestOutputKind, SamplingParams
from tercet.frontend.stream import RequestStream
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tercet.ipc.messages import Limits, ModelInfo, StepOutputs

NUM_REQUESTS = 256
GROWTH = [8, 64, 256, 1024]  # requests: µs per token must not rise with them
STEPS_PER_ROUND = 20

MODES: dict[str, dict[str, Any]] = {
    "token_ids": {"detokenize": False},
    "text": {},
    "text_stop": {"stop": ["</answer>", "\n\n\n"]},
    "cumulative": {"output_kind": RequestOutputKind.CUMULATIVE},
    "final_only": {"output_kind": RequestOutputKind.FINAL_ONLY},
}


def make_tokenizer() -> Tokenizer:
    """Byte-level, the commonest kind: 256 bytes, two of them to a merged token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pairs = [(first, second) for first in letters for second in letters]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(TokenizerBundle(tokenizer_json=backend.to_str().encode()))


class Bench:
    """Requests in steady decode, and a consumer for each."""

    def __init__(self, mode: str, loop: asyncio.AbstractEventLoop, num_requests: int) -> None:
        self.num_requests = num_requests
        tokenizer = make_tokenizer()
        self.vocab_size = len(tokenizer)
        model = ModelInfo(
            name="m",
            served_names=["m"],
            max_model_len=1 << 20,
            vocab_size=self.vocab_size,
            dtype="float32",
            architecture="None",
            eos_token_ids=[],
        )
        limits = Limits(
            max_num_seqs=num_requests,
            max_num_batched_tokens=8192,
            max_waiting=4096,
            max_logprobs=20,
            max_children=64,
            block_size=16,
            num_blocks=1 << 20,
        )
        inputs = InputProcessor(model, limits, tokenizer)
        self.outputs = OutputProcessor(lambda handles, reason: None)
        self.num_delivered = 0
        self.step = 0
        self.rng = np.random.default_rng(0)
        fields: dict[str, Any] = {"output_kind": RequestOutputKind.DELTA, **MODES[mode]}
        params = SamplingParams(max_tokens=None, **fields)
        handles = []
        self.tasks = []
        for i in range(num_requests):
            prepared = inputs.prepare(parse_prompt([65, 66, 67]), params, arrival_s=0.0)
            request = self.outputs.open(str(i), params, 0.0)
            handles.append(self.outputs.admit(request, prepared))
            self.tasks.append(loop.create_task(self.consume(RequestStream(request, self.outputs, loop))))
        self.handles = np.array(handles, np.uint64)

    async def consume(self, stream: RequestStream) -> None:
        async for _ in stream:
            self.num_delivered += 1

    def messages(self) -> list[StepOutputs]:
        made = []
        for _ in range(STEPS_PER_ROUND):
            made.append(
                StepOutputs(
                    epoch=1,
                    step=self.step,
                    handle=self.handles,
                    first_index=np.full(self.num_requests, self.step, np.int32),
                    token=self.rng.integers(0, self.vocab_size, self.num_requests, np.int32),
                    finish=np.zeros(self.num_requests, np.uint8),
                )
            )
            self.step += 1
        return made

    async def deliver(self, messages: list[StepOutputs]) -> None:
        for message in messages:
            self.outputs.apply(message)
            await asyncio.sleep(0)  # the consumers run
            await asyncio.sleep(0)


@contextmanager
def running(mode: str, kind: str, num_requests: int) -> Iterator[tuple[Bench, asyncio.AbstractEventLoop]]:
    loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
    bench = Bench(mode, loop, num_requests)
    loop.run_until_complete(asyncio.sleep(0))
    try:
        yield bench, loop
    finally:
        for task in bench.tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(bench.tasks))
        loop.close()


def measure(benchmark: Any, mode: str, kind: str, num_requests: int) -> None:
    with running(mode, kind, num_requests) as (bench, loop):

        def set_up() -> tuple[tuple[list[StepOutputs]], dict[str, Any]]:
            return (bench.messages(),), {}

        def run(messages: list[StepOutputs]) -> None:
            loop.run_until_complete(bench.deliver(messages))

        benchmark.pedantic(run, setup=set_up, rounds=30, warmup_rounds=3)
        expected = 0 if mode == "final_only" else bench.step * num_requests
        assert bench.num_delivered == expected  # every consumer took every step's token
        stats = benchmark.stats.stats
        median, best = (s * 1e6 / (STEPS_PER_ROUND * num_requests) for s in (stats.median, stats.min))
        benchmark.extra_info["us_per_token"] = round(median, 3)
        print(f"\n{mode}, {kind}, {num_requests} requests: {median:.2f} µs per token (best {best:.2f})")


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@pytest.mark.parametrize("mode", list(MODES))
def test_deliver(benchmark: Any, mode: str, kind: str) -> None:
    measure(benchmark, mode, kind, NUM_REQUESTS)


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
@pytest.mark.parametrize("num_requests", GROWTH)
def test_growth(benchmark: Any, num_requests: int, kind: str) -> None:
    measure(benchmark, "text", kind, num_requests)
