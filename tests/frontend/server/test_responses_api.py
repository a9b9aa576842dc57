"""/v1/responses through the `openai` client: create, stream, store, go on, background, cancel."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import response_create_params

from tercet.frontend.server.response_store import MemoryStore, StoredResponse
from tercet.frontend.server.responses_api import REFUSED_RESPONSES, ResponsesRequest
from tercet.frontend.server.settings import ServerSettings
from tercet.ipc.messages import Abort, AddRequest, Finish
from tests.frontend.fake_core import step_outputs
from tests.frontend.server.live_server import LiveServer, live_server, silent
from tests.frontend.server.test_http import until
from tests.frontend.text_engine import ids_of

# Parameter -> the test of this module that shows its effect.
HONOURED: dict[str, str] = {
    "input": "test_create",
    "model": "test_create",
    "instructions": "test_instructions_are_the_first_message",
    "metadata": "test_create",
    "user": "test_create",
    "max_output_tokens": "test_an_answer_that_is_cut_off_is_incomplete",
    "stream": "test_stream",
    "include": "test_logprobs",
    "top_logprobs": "test_logprobs",
    "store": "test_without_a_store_nothing_is_kept",
    "previous_response_id": "test_a_response_goes_on_from_another",
    "background": "test_background",
    "request_id": "test_sampling_reaches_the_core",
    "safety_identifier": "test_sampling_reaches_the_core",
    "prompt_cache_key": "test_sampling_reaches_the_core",
    **dict.fromkeys(
        (
            *("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "ignore_eos"),
            *("priority", "cache_salt"),
        ),
        "test_sampling_reaches_the_core",
    ),
}


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(settings=ServerSettings(enable_responses_store=True)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


def client_of(server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="-", max_retries=0)


def rendered(*messages: tuple[str, str]) -> str:
    return "".join(f"{role}: {text}\n" for role, text in messages) + "assistant:"


def test_every_parameter_is_honoured_or_refused() -> None:
    schema = set(typing.get_type_hints(response_create_params.ResponseCreateParamsBase)) | {"stream"}
    fields = set(ResponsesRequest.__struct_fields__)
    assert schema <= fields, schema - fields
    assert set(REFUSED_RESPONSES) <= fields
    for name in fields:
        assert (name in HONOURED) != (name in REFUSED_RESPONSES), name
    assert all(callable(globals()[test]) for test in HONOURED.values())


@pytest.mark.parametrize("name", sorted(REFUSED_RESPONSES))
def test_what_is_not_supported_is_refused_by_its_name(server: LiveServer, name: str) -> None:
    status, data = server.post("/v1/responses", input="x", **{name: {"surely": "not neutral"}})
    assert status == 400
    assert data["error"]["param"] == name
    for neutral in (None, *REFUSED_RESPONSES[name][0]):
        assert server.post("/v1/responses", input="x", **{name: neutral})[0] == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0].type"),
        ({"input": [{"content": "x"}]}, "messages[0].role"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include"),
        ({"input": "x", "store": False, "background": True}, "background"),
        ({"input": "x", "stream": True, "background": True}, "background"),
        ({"input": "x", "temperatur": 1}, "temperatur"),
    ],
)
def test_wrong_requests(server: LiveServer, body: dict[str, Any], param: str) -> None:
    status, data = server.post("/v1/responses", **body)
    assert status == 400, data
    assert data["error"]["param"] == param


def test_create(client: OpenAI) -> None:
    response = client.responses.create(model="fake", input="Hello", metadata={"k": "v"}, user="ada")
    assert response.output_text == rendered(("user", "Hello"))
    assert (response.model, response.metadata, response.user) == ("fake", {"k": "v"}, "ada")
    assert response.status == "incomplete"  # the core says that it has come to the longest length
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]
    again = client.responses.create(model="fake", input=parts)  # type: ignore[arg-type]
    assert again.output_text == response.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="Hello")


def test_instructions_are_the_first_message(client: OpenAI) -> None:
    response = client.responses.create(model="fake", input="Hello", instructions="Be brief")
    assert response.output_text == rendered(("system", "Be brief"), ("user", "Hello"))
    assert response.instructions == "Be brief"


def test_an_answer_that_is_cut_off_is_incomplete(client: OpenAI) -> None:
    response = client.responses.create(model="fake", input="Hello", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert response.usage.output_tokens == 2


def test_stream(client: OpenAI) -> None:
    text, kinds, numbers, last = "", [], [], None
    for event in client.responses.create(model="fake", input="Hello there", stream=True):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert numbers == list(range(len(numbers)))
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert last is not None
    assert last.response.output_text == text == rendered(("user", "Hello there"))  # type: ignore[union-attr]
    assert client.responses.retrieve(last.response.id).output_text == text  # type: ignore[union-attr]


def test_logprobs(client: OpenAI) -> None:
    for fields in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        response = client.responses.create(model="fake", input="Hello", **fields)  # type: ignore[call-overload]
        logprobs = response.output[0].content[0].logprobs
        assert "".join(entry.token for entry in logprobs) == response.output_text
        assert len(logprobs[0].top_logprobs) == fields.get("top_logprobs", 0)


def test_sampling_reaches_the_core(server: LiveServer) -> None:
    while not server.core.received.empty():
        server.core.received.get()
    fields: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.6,
        "top_k": 5,
        "min_p": 0.2,
        "seed": 9,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "priority": 3,
        "cache_salt": "s",
        "request_id": "mine",
        "safety_identifier": "ada",
        "prompt_cache_key": "k",
    }
    status, data = server.post("/v1/responses", input="Hello", **fields)
    assert (status, data["id"]) == (200, "resp_mine")
    message = server.core.expect(AddRequest)
    sampling = message.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.6, 5, 0.2)
    assert (sampling.repetition_penalty, sampling.eos_token_ids) == (1.5, [])
    assert (message.seeds, message.priority, message.cache_salt) == ([9], 3, "s")


def test_a_response_goes_on_from_another(client: OpenAI) -> None:
    first = client.responses.create(model="fake", input="One", instructions="Only here")
    second = client.responses.create(model="fake", input="Two", previous_response_id=first.id)
    assert second.output_text == rendered(("user", "One"), ("assistant", first.output_text), ("user", "Two"))
    assert second.previous_response_id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="fake", input="Three", previous_response_id=first.id)


def test_without_a_store_nothing_is_kept(client: OpenAI) -> None:
    response = client.responses.create(model="fake", input="One", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with live_server() as server, client_of(server) as other:
        assert other.responses.create(model="fake", input="One").output_text
        for fields in ({"store": True}, {"background": True}, {"previous_response_id": "resp_x"}):
            with pytest.raises(openai.BadRequestError) as error:
                other.responses.create(model="fake", input="One", **fields)  # type: ignore[call-overload]
            assert error.value.param == next(iter(fields))


def test_background() -> None:
    settings = ServerSettings(enable_responses_store=True)
    with live_server(silent, settings) as server, client_of(server) as client:
        response = client.responses.create(model="fake", input="One", background=True)
        assert response.status == "queued"
        message = server.core.expect(AddRequest)
        assert client.responses.retrieve(response.id).status == "in_progress"
        assert server.context.admission.num_requests == 1
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="fake", input="Two", previous_response_id=response.id)
        done = {message.handle: Finish.EOS}
        server.core.send(step_outputs({message.handle: ids_of("Hi")}, finish=done))
        until(lambda: client.responses.retrieve(response.id).status == "completed")
        assert client.responses.retrieve(response.id).output_text.startswith("H")
        assert client.responses.cancel(response.id).status == "completed"  # too late
        until(lambda: server.context.admission.num_requests == 0)


def test_cancel_stops_what_runs_in_the_background() -> None:
    settings = ServerSettings(enable_responses_store=True)
    with live_server(silent, settings) as server, client_of(server) as client:
        response = client.responses.create(model="fake", input="One", background=True)
        message = server.core.expect(AddRequest)
        assert client.responses.cancel(response.id).status == "cancelled"
        assert server.core.expect(Abort).handles.tolist() == [message.handle]
        assert client.responses.retrieve(response.id).status == "cancelled"
        until(lambda: server.context.admission.num_requests == 0)
        with pytest.raises(openai.NotFoundError):
            client.responses.cancel("resp_nothing")
        client.responses.create(model="fake", input="Two", background=True)  # ended with the server
        server.core.expect(AddRequest)


def test_a_full_store_forgets_what_is_oldest() -> None:
    store = MemoryStore(2)
    for name in ("a", "b", "c"):
        store.put(StoredResponse({"id": name}))
    assert store.get("a") is None
    assert store.get("b") is not None
    assert store.delete("b")
    assert not store.delete("b")
