"""What vLLM's programs use beside `generate` and `chat`: parsed arguments, enqueue, what an engine says of itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tercet import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    EngineArgs,
    EngineError,
    RequestOutput,
    SamplingParams,
    ValidationError,
)
from tercet.config import SimulationConfig
from tercet.utils.argparse_utils import FlexibleArgumentParser

FLAGS = [
    "--device",
    "simulated",
    "--max_model_len",
    "512",
    "--simulation",
    '{"step_us": 300, "num_blocks": 64}',
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Made from parsed arguments, all fields given, as vLLM's offline examples do."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument_group("sampling").add_argument("--max-tokens", type=int)
    args = vars(parser.parse_args([*FLAGS, "--max-tokens", "5"]))
    assert args.pop("max_tokens") == 5
    with LLM(**args) as engine:
        yield engine


def running(llm: LLM) -> float:
    (gauge,) = [m for m in llm.get_metrics() if m.name == "tercet:num_requests_running"]
    return float(getattr(gauge, "value"))  # noqa: B009


def test_enqueued_requests_are_collected_in_order(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=1 + i % 7, ignore_eos=True, seed=i) for i in range(40)]
    prompts: list[Any] = [[i + 1, 2] for i in range(40)]
    ids = llm.enqueue(prompts, params, use_tqdm=False)
    ids += llm.enqueue({"prompt_token_ids": [9]}, SamplingParams(max_tokens=3, n=2), use_tqdm=False)
    assert len(set(ids)) == 41
    between = llm.generate(prompts[3], params[3], use_tqdm=False)  # does not collect what others enqueued
    outputs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    assert [output.request_id for output in outputs] == ids
    assert [output.prompt_token_ids for output in outputs] == [*prompts, [9]]
    assert [len(output.outputs[0].token_ids) for output in outputs[:40]] == [1 + i % 7 for i in range(40)]
    assert all(output.finished for output in outputs)
    assert outputs[3].outputs[0].token_ids == between[0].outputs[0].token_ids
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_enqueue_returns_while_requests_run(llm: LLM) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    started = time.monotonic()
    llm.enqueue([[1], [2]], params, use_tqdm=False)
    returned = time.monotonic() - started
    (first, _) = llm.wait_for_completion(use_tqdm=False)
    assert returned < time.monotonic() - started - 0.05  # 400 steps of 0.3 ms at least
    assert len(first.outputs[0].token_ids) == 400


def test_more_enqueued_than_the_window(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm._pending._window, "_size", 20)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    ids = llm.enqueue([[i + 1] for i in range(200)], params, use_tqdm=False)
    assert [output.request_id for output in llm.wait_for_completion(use_tqdm=False)] == ids


def test_a_wrong_prompt_leaves_what_was_enqueued_before(llm: LLM) -> None:
    (kept,) = llm.enqueue([5, 6], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    long = SamplingParams(max_tokens=400, ignore_eos=True)
    with pytest.raises(ValidationError, match="prompt_token_ids"):
        llm.enqueue([[1]] * 40 + [[10**6]], long, use_tqdm=False)
    assert [output.request_id for output in llm.wait_for_completion(use_tqdm=False)] == [kept]
    assert running(llm) == 0  # those before the wrong one were aborted
    with pytest.raises(ValidationError, match="output_type: must be RequestOutput"):
        llm.wait_for_completion(int, use_tqdm=False)  # type: ignore[arg-type]


def test_a_wrong_conversation_of_several_is_named(llm: LLM) -> None:
    from tercet.frontend.llm import _each

    def render(conversation: str) -> str:
        if conversation == "bad":
            raise ValidationError("messages[0].content", "is missing")
        return conversation

    assert _each(["a", "b"], render) == ["a", "b"]
    with pytest.raises(ValidationError, match=r"^messages\[1\]\[0\]\.content: is missing"):
        _each(["a", "bad"], render)


def test_model_config_of_llm(llm: LLM) -> None:
    assert llm.model_config.max_model_len == 512
    assert llm.model_config.get_vocab_size() == llm.model_info.vocab_size == 49152
    assert llm.model_config.served_model_name == "simulated"


def test_async_engine_of_parsed_arguments_says_what_it_is() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args([*FLAGS, "--enable_log_requests"]))
    assert args.enable_log_requests

    async def main() -> None:
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
        before = engine.model_config  # known before the first asynchronous call
        try:
            assert await engine.get_model_config() == before
            assert (before.max_model_len, before.max_logprobs) == (512, 20)
            assert await engine.get_supported_tasks() == ("generate",)
            assert not await engine.is_tracing_enabled()
            async with AsyncLLM.connect(engine.address) as other:
                assert other.model_config == before
            late = AsyncLLM(engine.address)
            with pytest.raises(EngineError, match="not attached yet"):
                _ = late.model_config
            late.shutdown()
        finally:
            await engine.aclose()

    asyncio.run(main())


def test_draining_waits_for_every_frontend() -> None:
    args = AsyncEngineArgs(device="simulated", simulation=SimulationConfig(step_us=1000), max_model_len=8192)

    async def main() -> None:
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
        async with engine, AsyncLLM.connect(engine.address) as other:
            await engine.wait_for_requests_to_drain(0)  # idle already
            params = SamplingParams(max_tokens=300, ignore_eos=True)
            stream = await other.add_request([1, 2], params)
            await stream.get()  # so that the core has it
            with pytest.raises(
                TimeoutError, match=r"not idle after 0\.05 s: 1 requests are running, 0 are waiting"
            ):
                await engine.wait_for_requests_to_drain(0.05)
            await engine.wait_for_requests_to_drain()
            output = await asyncio.wait_for(stream.get(), 1)
            assert len(output.outputs[0].token_ids) == 300
            own = await engine.add_request([1, 2], params)
            await engine.wait_for_requests_to_drain(drain_timeout=60)
            assert engine.get_num_unfinished_requests() == 0
            assert (await own.get()).finished
            with pytest.raises(ValidationError, match="drain_timeout"):
                await engine.wait_for_requests_to_drain(-1)

    asyncio.run(main())
