"""Every parameter of OpenAI's chat and completion schemas, and vLLM's beside them, is honoured or refused.

The schemas are those of the installed `openai` package. HONOURED names the test of this module that shows each
parameter's effect; a parameter without one that is not refused either fails `test_every_parameter_is_known`.
"""

from __future__ import annotations

import logging
import typing
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from tercet.frontend.server.parameters import REFUSED
from tercet.frontend.server.protocol import ChatRequest, CompletionRequest
from tercet.frontend.server.settings import ServerSettings
from tercet.ipc.messages import AddRequest
from tests.frontend.server.live_server import LiveServer, live_server
from tests.frontend.text_engine import ids_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hello there"}]
RENDERED = "user: Hello there\nassistant:"

# Parameters that vLLM has beside OpenAI's.
VLLM_COMMON = [
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "logprob_token_ids",
    "allowed_token_ids",
    "bad_words",
    "echo",
    "add_special_tokens",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "stream_interval",
    "use_beam_search",
    "length_penalty",
    "thinking_token_budget",
]
VLLM_CHAT = [
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "include_reasoning",
    "mm_processor_kwargs",
    "media_io_kwargs",
]

# To the core: parameter -> value, how the request shows it.
SENT: dict[str, tuple[Any, Callable[[AddRequest], bool]]] = {
    "temperature": (0.7, lambda m: m.sampling.temperature == 0.7),
    "top_p": (0.6, lambda m: m.sampling.top_p == 0.6),
    "top_k": (5, lambda m: m.sampling.top_k == 5),
    "min_p": (0.2, lambda m: m.sampling.min_p == 0.2),
    "seed": (77, lambda m: m.seeds == [77]),
    "n": (3, lambda m: len(m.seeds) == 3),
    "presence_penalty": (1.5, lambda m: m.sampling.presence_penalty == 1.5),
    "frequency_penalty": (-1.5, lambda m: m.sampling.frequency_penalty == -1.5),
    "repetition_penalty": (1.1, lambda m: m.sampling.repetition_penalty == 1.1),
    "logit_bias": ({"5": 2.0}, lambda m: _list(m.sampling.logit_bias_ids) == [5]),
    "allowed_token_ids": ([4, 9], lambda m: _list(m.sampling.allowed_token_ids) == [4, 9]),
    "bad_words": (["one"], lambda m: ids_of("one") in m.sampling.bad_words),
    "max_tokens": (3, lambda m: m.sampling.max_tokens == 3),
    "min_tokens": (2, lambda m: m.sampling.min_tokens == 2),
    "stop_token_ids": ([8], lambda m: m.sampling.stop_token_ids == [8]),
    "ignore_eos": (True, lambda m: m.sampling.eos_token_ids == []),
    "cache_salt": ("s", lambda m: m.cache_salt == "s"),
    "priority": (4, lambda m: m.priority == 4),
}
SENT_BY_CHAT: dict[str, tuple[Any, Callable[[AddRequest], bool]]] = {
    "max_completion_tokens": (3, lambda m: m.sampling.max_tokens == 3)
}

HONOURED_COMMON: dict[str, str] = {
    **dict.fromkeys(SENT, "test_parameter_reaches_the_core"),
    "model": "test_model",
    "stop": "test_stop",
    "include_stop_str_in_output": "test_stop",
    "stream": "test_stream",
    "stream_options": "test_stream_options",
    "stream_interval": "test_stream_interval",
    "prompt_logprobs": "test_prompt_logprobs",
    "skip_special_tokens": "test_special_tokens",
    "spaces_between_special_tokens": "test_special_tokens",
    "return_token_ids": "test_return_token_ids",
    "return_tokens_as_token_ids": "test_return_tokens_as_token_ids",
    "add_special_tokens": "test_add_special_tokens",
    "request_id": "test_request_id",
    "user": "test_who_asks_is_logged",
    "echo": "test_echo",
    "logprobs": "test_logprobs",
}
HONOURED_BY_CHAT: dict[str, str] = {
    **HONOURED_COMMON,
    **dict.fromkeys(SENT_BY_CHAT, "test_parameter_reaches_the_core"),
    "messages": "test_messages",
    "top_logprobs": "test_logprobs",
    "add_generation_prompt": "test_template_options",
    "continue_final_message": "test_template_options",
    "documents": "test_template_options",
    "chat_template": "test_template_options",
    "chat_template_kwargs": "test_template_options",
    "prompt_cache_key": "test_prompt_cache_key",
    "safety_identifier": "test_who_asks_is_logged",
}
HONOURED_BY_COMPLETIONS: dict[str, str] = {
    **HONOURED_COMMON,
    "prompt": "test_prompts",
    "best_of": "test_best_of",
}


def _list(column: Any) -> list[Any]:
    return [] if column is None else column.tolist()


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{{ mood }}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    settings = ServerSettings(chat_template=template, trust_request_chat_template=True, log_requests=True)
    with live_server(settings=settings) as running:
        yield running


def ask(server: LiveServer, path: str, **fields: Any) -> Any:
    """A response of a request that is right."""
    subject = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hello there"}
    status, data = server.post(path, **{**subject, **fields})
    assert status == 200, data
    return data


def sent(server: LiveServer) -> AddRequest:
    """The last request that reached the core."""
    message = server.core.expect(AddRequest)
    while not server.core.received.empty():
        later = server.core.received.get()
        message = later if isinstance(later, AddRequest) else message
    return message


def forget(server: LiveServer) -> None:
    while not server.core.received.empty():
        server.core.received.get()


# ---- the tables


def schema_of(*kinds: Any) -> set[str]:
    return {name for kind in kinds for name in typing.get_type_hints(kind)}


OPENAI_CHAT = schema_of(chat_params.CompletionCreateParamsBase, chat_params.CompletionCreateParamsStreaming)
OPENAI_COMPLETIONS = schema_of(
    completion_create_params.CompletionCreateParamsBase,
    completion_create_params.CompletionCreateParamsStreaming,
)
KINDS: dict[str, tuple[type[msgspec.Struct], dict[str, str], set[str]]] = {
    CHAT: (ChatRequest, HONOURED_BY_CHAT, OPENAI_CHAT | set(VLLM_COMMON) | set(VLLM_CHAT)),
    COMPLETIONS: (CompletionRequest, HONOURED_BY_COMPLETIONS, OPENAI_COMPLETIONS | set(VLLM_COMMON)),
}


@pytest.mark.parametrize("path", KINDS)
def test_every_parameter_is_known(path: str) -> None:
    kind, honoured, schema = KINDS[path]
    fields = set(kind.__struct_fields__)
    assert schema <= fields, schema - fields
    for name in fields:
        assert (name in honoured) != (name in REFUSED), name
    assert all(callable(globals()[test]) for test in honoured.values())
    assert set(honoured) <= fields


REFUSALS = [
    (path, name) for path, (kind, *_) in KINDS.items() for name in kind.__struct_fields__ if name in REFUSED
]


@pytest.mark.parametrize(("path", "name"), REFUSALS)
def test_what_is_not_supported_is_refused_by_its_name(server: LiveServer, path: str, name: str) -> None:
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hello"}
    status, data = server.post(path, **body, **{name: {"surely": ["not neutral"]}})
    assert status == 400
    assert data["error"]["param"] == name
    assert name in data["error"]["message"]
    assert data["error"]["type"] == "invalid_request_error"
    for neutral in (None, *REFUSED[name][0]):
        status, data = server.post(path, **body, **{name: neutral})
        assert status == 200, (neutral, data)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_unknown_parameter_is_refused_by_its_name(server: LiveServer, path: str) -> None:
    status, data = server.post(path, messages=MESSAGES, prompt="x", temperatur=1)
    assert status == 400
    assert data["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_p": 0}, "top_p"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": "x"}}, "logit_bias[...]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"seed": 2**70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"request_id": "a b"}, "request_id"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_wrong_values_are_refused_by_their_names(
    server: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    subject = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hello"}
    status, data = server.post(path, **subject, **body)
    assert status == 400, data
    assert data["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "logprobs"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 4000}]}, "messages"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
        (COMPLETIONS, {"prompt": [10**6]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs"),
    ],
)
def test_wrong_requests(server: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    status, data = server.post(path, **body)
    assert status == 400, data
    assert data["error"]["param"] == param


# ---- what each parameter does


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in (CHAT, COMPLETIONS) for name in SENT] + [(CHAT, name) for name in SENT_BY_CHAT],
)
def test_parameter_reaches_the_core(server: LiveServer, path: str, name: str) -> None:
    value, shows = {**SENT, **SENT_BY_CHAT}[name]
    forget(server)
    ask(server, path)
    assert not shows(sent(server))  # so that it is the parameter that makes the difference
    ask(server, path, **{name: value})
    assert shows(sent(server))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_model(server: LiveServer, path: str) -> None:
    assert ask(server, path, model="fake")["model"] == "fake"
    body = {"messages": MESSAGES} if path == CHAT else {"prompt": "x"}
    status, data = server.post(path, **body, model="other")
    assert status == 404
    assert data["error"]["code"] == "model_not_found"


def test_messages(server: LiveServer) -> None:
    data = ask(server, CHAT)
    (choice,) = data["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == RENDERED  # the core answers with what it was given
    assert choice["finish_reason"] == "length"
    assert data["object"] == "chat.completion"
    count = len(ids_of(RENDERED))
    assert data["usage"] == {
        "prompt_tokens": count,
        "completion_tokens": count,
        "total_tokens": 2 * count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts(server: LiveServer) -> None:
    ids = ids_of("some text")
    for prompt, texts in {
        "some text": ["some text"],
        ("one", "two", "three"): ["one", "two", "three"],
        tuple(ids): ["some text"],
        (tuple(ids), tuple(ids_of("more"))): ["some text", "more"],
    }.items():
        data = ask(server, COMPLETIONS, prompt=prompt)
        assert [choice["text"] for choice in data["choices"]] == texts
        assert [choice["index"] for choice in data["choices"]] == list(range(len(texts)))
    data = ask(server, COMPLETIONS, prompt=["one", "two"], n=2)
    assert [choice["text"] for choice in data["choices"]] == ["one", "one", "two", "two"]
    assert data["usage"]["prompt_tokens"] == len(ids_of("one")) + len(ids_of("two"))


def test_completions_give_16_tokens_unless_told_otherwise(server: LiveServer) -> None:
    forget(server)
    ask(server, COMPLETIONS)
    assert sent(server).sampling.max_tokens == 16
    ask(server, CHAT)
    assert sent(server).sampling.max_tokens > 400  # to the end of the context


def test_the_models_own_defaults_apply(server: LiveServer) -> None:
    forget(server)
    ask(server, CHAT)
    sampling = sent(server).sampling
    assert (sampling.temperature, sampling.top_k) == (0.5, 7)


@pytest.mark.parametrize("stream", [False, True])
def test_stop(server: LiveServer, stream: bool) -> None:
    def texts(**fields: Any) -> list[Any]:
        body = {"prompt": "Hello there, world", "stop": ["there"], "max_tokens": 100, **fields}
        if not stream:
            (choice,) = ask(server, COMPLETIONS, **body)["choices"]
            return [choice["text"], choice["finish_reason"], choice["stop_reason"]]
        chunks = server.stream(COMPLETIONS, **body)[:-1]
        last = chunks[-1]["choices"][0]
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return [text, last["finish_reason"], last["stop_reason"]]

    assert texts() == ["Hello ", "stop", "there"]
    assert texts(stop="there", include_stop_str_in_output=True) == ["Hello there", "stop", "there"]


def test_stream(server: LiveServer) -> None:
    events = server.stream(CHAT, messages=MESSAGES)
    assert events[-1] == "[DONE]"
    chunks = events[:-1]
    first = chunks[0]["choices"][0]["delta"]
    assert first == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == RENDERED
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert {chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]} == {None}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in chunks)


def test_stream_of_several_prompts_and_choices(server: LiveServer) -> None:
    prompts = ["one text", "two texts, longer", "3"]
    events = server.stream(COMPLETIONS, prompt=prompts, n=2, max_tokens=50)
    texts = [""] * 6
    ends = [""] * 6
    for chunk in events[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        ends[choice["index"]] += choice["finish_reason"] or ""
    assert texts == [prompt for prompt in prompts for _ in range(2)]
    assert ends == ["length"] * 6


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_stream_options(server: LiveServer, path: str) -> None:
    subject = {"messages": MESSAGES} if path == CHAT else {"prompt": ["Hello", "there"]}
    events = server.stream(path, **subject, stream_options={"include_usage": True})
    *chunks, last, done = events
    assert done == "[DONE]"
    assert last["choices"] == []
    status, whole = server.post(path, **subject)
    assert status == 200
    assert last["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    events = server.stream(path, **subject, stream_options={"continuous_usage_stats": True})
    usages = [chunk["usage"]["completion_tokens"] for chunk in events[:-1] if chunk["usage"]]
    assert usages == sorted(usages)
    assert usages[-1] == whole["usage"]["completion_tokens"]


def test_stream_interval(server: LiveServer) -> None:
    text = "a b c d e f g h"
    every = server.stream(COMPLETIONS, prompt=text, max_tokens=100, stream_interval=100)
    chunks = [chunk["choices"][0]["text"] for chunk in every[:-1]]
    assert "".join(chunks) == text
    assert len(chunks) <= 2  # the first token at once, then all that is left


def test_prompt_logprobs(server: LiveServer) -> None:
    data = ask(server, CHAT, prompt_logprobs=1)
    entries = data["prompt_logprobs"]
    ids = ids_of(RENDERED)
    assert len(entries) == len(ids)
    assert entries[0] is None
    assert entries[1][str(ids[1])]["logprob"] == -0.25
    assert set(entries[1]) == {str(ids[1]), "10"}
    data = ask(server, COMPLETIONS, prompt_logprobs=0)
    assert len(data["choices"][0]["prompt_logprobs"]) == len(ids_of("Hello there"))


def test_logprobs(server: LiveServer) -> None:
    ids = ids_of(RENDERED)
    content = ask(server, CHAT, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == RENDERED
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids)
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-1.0, -2.0]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    content = ask(server, CHAT, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []
    assert ask(server, CHAT)["choices"][0]["logprobs"] is None
    found = ask(server, COMPLETIONS, prompt="Hello there, you", logprobs=1)["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == "Hello there, you"
    assert found["text_offset"][0] == 0
    assert found["token_logprobs"] == [-0.5] * len(found["tokens"])
    assert sorted(found["top_logprobs"][0].values()) == [-1.0, -0.5]


def test_the_bytes_of_tokens_make_up_characters_that_tokens_cut(server: LiveServer) -> None:
    text = "世界 🙂"
    found = ask(server, CHAT, messages=[{"role": "user", "content": text}], logprobs=True)
    content = found["choices"][0]["logprobs"]["content"]
    assert any("\ufffd" in entry["token"] for entry in content)  # a token with no text of its own
    data = b"".join(bytes(entry["bytes"]) for entry in content)
    assert data.decode() == f"user: {text}\nassistant:"


def test_logprobs_of_a_stream_are_those_of_the_whole(server: LiveServer) -> None:
    fields: dict[str, Any] = {"prompt": "Hello there, you", "logprobs": 2, "max_tokens": 50}
    whole = ask(server, COMPLETIONS, **fields)["choices"][0]["logprobs"]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in server.stream(COMPLETIONS, **fields)[:-1]]
    for name in whole:
        assert [item for piece in pieces for item in piece[name]] == whole[name]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: LiveServer, stream: bool) -> None:
    def text(**fields: Any) -> str:
        if stream:
            return "".join(c["choices"][0]["text"] for c in server.stream(COMPLETIONS, **fields)[:-1])
        return str(ask(server, COMPLETIONS, **fields)["choices"][0]["text"])

    assert text(prompt="one two", echo=True) == "one twoone two"
    assert text(prompt=ids_of("one two"), echo=True) == "one twoone two"
    assert text(prompt="one two", echo=True, max_tokens=0) == "one two"


def test_echo_with_logprobs_scores_the_prompt(server: LiveServer) -> None:
    ids = ids_of("one two three")
    data = ask(server, COMPLETIONS, prompt="one two three", echo=True, max_tokens=0, logprobs=1)
    found = data["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [None] + [-0.25] * (len(ids) - 1)
    assert "".join(found["tokens"]) == "one two three"
    assert data["usage"]["completion_tokens"] == 0


def test_echo_of_a_chat_that_is_continued(server: LiveServer) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Well"}]
    fields = {"messages": messages, "echo": True, "continue_final_message": True}
    content = ask(server, CHAT, **fields)["choices"][0]["message"]["content"]
    assert content == "Well" + "user: Hello there\nassistant: Well"
    chunks = server.stream(CHAT, **fields)[:-1]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == content


def test_special_tokens(server: LiveServer) -> None:
    special = ids_of("<|end|>")
    prompt = [*ids_of("a"), *special, *special, *ids_of("b")]
    assert ask(server, COMPLETIONS, prompt=prompt)["choices"][0]["text"] == "ab"
    kept = ask(server, COMPLETIONS, prompt=prompt, skip_special_tokens=False)
    with_spaces = kept["choices"][0]["text"]
    without = ask(
        server,
        COMPLETIONS,
        prompt=prompt,
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
    )["choices"][0]["text"]
    assert "<|end|>" in with_spaces
    assert without == with_spaces.replace(" ", "")


def test_return_token_ids(server: LiveServer) -> None:
    ids = ids_of(RENDERED)
    data = ask(server, CHAT, return_token_ids=True)
    assert data["prompt_token_ids"] == ids
    assert data["choices"][0]["token_ids"] == ids
    assert "token_ids" not in ask(server, CHAT)["choices"][0]
    data = ask(server, COMPLETIONS, return_token_ids=True, max_tokens=2)
    assert data["choices"][0]["prompt_token_ids"] == ids_of("Hello there")
    assert data["choices"][0]["token_ids"] == ids_of("Hello there")[:2]
    chunks = server.stream(CHAT, messages=MESSAGES, return_token_ids=True)[:-1]
    assert chunks[0]["prompt_token_ids"] == ids
    assert [one for chunk in chunks for one in chunk["choices"][0].get("token_ids", [])] == ids


def test_return_tokens_as_token_ids(server: LiveServer) -> None:
    fields = {"logprobs": True, "return_tokens_as_token_ids": True}
    content = ask(server, CHAT, **fields)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{one}" for one in ids_of(RENDERED)]
    fields = {"logprobs": 1, "return_tokens_as_token_ids": True}
    found = ask(server, COMPLETIONS, **fields)["choices"][0]["logprobs"]
    assert found["tokens"][0] == f"token_id:{ids_of('Hello there')[0]}"
    assert "token_id:10" in found["top_logprobs"][0]


def test_add_special_tokens(server: LiveServer) -> None:
    forget(server)
    for path in (CHAT, COMPLETIONS):
        ask(server, path, add_special_tokens=True)
        plain = sent(server).token_ids.tolist()
        ask(server, path, add_special_tokens=False)
        assert sent(server).token_ids.tolist() == plain  # this tokenizer has none to add


def test_request_id(server: LiveServer) -> None:
    assert ask(server, CHAT, request_id="mine")["id"] == "chatcmpl-mine"
    body = {"prompt": "x", "request_id": "mine"}
    status, headers, data = server.request("POST", COMPLETIONS, body, {"X-Request-Id": "theirs"})
    assert status == 200
    assert headers["x-request-id"] == "theirs"
    assert b'"cmpl-theirs"' in data


def test_who_asks_is_logged(server: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tercet"):
        ask(server, CHAT, user="ada")
        ask(server, CHAT, safety_identifier="grace")
        ask(server, COMPLETIONS, user="alan")
    for name in ("ada", "grace", "alan"):
        assert f"user='{name}'" in caplog.text
    assert "Hello there" not in caplog.text


def test_prompt_cache_key(server: LiveServer) -> None:
    # A hint where a prefix may be cached, which is so for every prompt: it neither splits nor widens the cache.
    forget(server)
    ask(server, CHAT, prompt_cache_key="k")
    message = sent(server)
    assert (message.cache_salt, message.read_prefix_cache) == ("", True)


def test_template_options(server: LiveServer) -> None:
    def rendered(**fields: Any) -> str:
        return str(ask(server, CHAT, **fields)["choices"][0]["message"]["content"])

    assert rendered(add_generation_prompt=False) == "user: Hello there\n"
    assert rendered(continue_final_message=True) == "user: Hello there"
    assert rendered(documents=[{"text": "doc"}]) == "user: Hello there\n[doc]assistant:"
    assert rendered(chat_template_kwargs={"mood": "glad "}) == "user: Hello there\nglad assistant:"
    assert rendered(chat_template="{{ messages[0].content }}!") == "Hello there!"
    for name in ("tools", "messages", "add_generation_prompt", "tokenize"):
        status, data = server.post(CHAT, messages=MESSAGES, chat_template_kwargs={name: 1})
        assert status == 400
        assert data["error"]["param"] == f"chat_template_kwargs.{name}"


def test_best_of(server: LiveServer) -> None:
    forget(server)
    data = ask(server, COMPLETIONS, n=2, best_of=3, max_tokens=2)
    assert len(sent(server).seeds) == 3
    assert [choice["index"] for choice in data["choices"]] == [0, 1]
    assert data["choices"][0]["logprobs"] is None  # they were needed, and not asked for
    assert data["usage"]["completion_tokens"] == 6
