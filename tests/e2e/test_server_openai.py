"""The `openai` client, synchronous and asynchronous, against a live server of the default model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tercet.errors import ModelNotFoundError
from tercet.model_source import resolve_model
from tests.e2e.server_tools import ServerProcess, serve

pytestmark = pytest.mark.timeout(300)

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
KEY = "a-key-for-tests"


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    try:
        model = str(resolve_model(None).path)
    except ModelNotFoundError:
        pytest.skip("the default model is not installed; `make install` brings it")
    limits = ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "128M"]
    with serve(model, "--served-model-name", "smol", "other-name", *limits, TERCET_API_KEY=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smol", "other-name"]
    assert client.models.retrieve("smol").object == "model"


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="smol", messages=QUESTION, temperature=0, max_tokens=20)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert answer.model == "smol"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.chat.completions.create(
        model="other-name", messages=QUESTION, temperature=0, max_tokens=20
    )
    assert again.choices[0].message.content == choice.message.content
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens >= 16  # its prompt was computed before


def test_a_stream_says_what_the_whole_says(client: OpenAI) -> None:
    fields = {"model": "smol", "messages": QUESTION, "temperature": 0.0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**fields)
    text, usage, reason = "", None, None
    for chunk in client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert reason == whole.choices[0].finish_reason
    assert whole.usage is not None
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smol", messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content).startswith(
        answer.choices[0].message.content or "-"
    )
    for entry in logprobs.content:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.token == entry.top_logprobs[0].token  # greedy takes the most likely
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob)


def test_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model="smol",
        prompt=["The capital of France is", "One, two, three,"],
        temperature=0,
        max_tokens=3,
        logprobs=2,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].logprobs is not None
    assert "".join(answer.choices[0].logprobs.tokens or []) == answer.choices[0].text
    texts = ["", ""]
    for chunk in client.completions.create(
        model="smol",
        prompt=["The capital of France is", "One, two, three,"],
        temperature=0,
        max_tokens=3,
        stream=True,
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in answer.choices]


def test_seed_stop_and_n(client: OpenAI) -> None:
    def texts(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="smol", messages=QUESTION, temperature=1.0, n=3, seed=seed, max_tokens=8
        )
        return [choice.message.content for choice in answer.choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    stopped = client.completions.create(
        model="smol", prompt="One, two, three,", temperature=0, max_tokens=30, stop=["five"]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "five" not in stopped.choices[0].text


def test_errors_are_the_clients_own(client: OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="smol", messages=QUESTION, temperature=5)
    assert bad.value.param == "temperature"
    tool = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.chat.completions.create(model="smol", messages=QUESTION, tools=[tool])
    assert (unsupported.value.param, unsupported.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    stranger = OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="smol", prompt="word " * 2000)
    assert long.value.param == "prompt"


def test_vllms_parameters_go_into_the_extra_body(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smol",
        messages=QUESTION,
        max_tokens=4,
        extra_body={"top_k": 1, "min_tokens": 4, "return_token_ids": True, "ignore_eos": True},
    )
    assert len(answer.choices[0].token_ids) == 4  # type: ignore[attr-defined]


def test_many_at_once_by_the_asynchronous_client(server: ServerProcess) -> None:
    async def one(client: AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="smol",
            messages=[{"role": "user", "content": f"Say the number {number}."}],
            temperature=0,
            max_tokens=8,
            stream=True,
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def test() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(12)))

    answers = asyncio.run(test())
    assert all(answers)


def test_leaving_a_stream_frees_the_engine(client: OpenAI, server: ServerProcess) -> None:
    stream = client.chat.completions.create(
        model="smol", messages=QUESTION, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    # A server of 8 rows whose 8 streams were all left takes new requests at once.
    answer = client.chat.completions.create(model="smol", messages=QUESTION, temperature=0, max_tokens=1)
    assert answer.choices[0].finish_reason == "length"
