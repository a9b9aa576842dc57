"""/v1/messages: Anthropic's form of a chat."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tercet.frontend.server.messages_api import REFUSED_MESSAGES, MessagesRequest
from tercet.ipc.messages import AddRequest, RequestFailed
from tests.frontend.fake_core import EPOCH, step_outputs
from tests.frontend.server.live_server import LiveServer, live_server, silent
from tests.frontend.server.test_http import read_until
from tests.frontend.text_engine import ids_of

PATH = "/v1/messages"
BODY: dict[str, Any] = {"max_tokens": 100, "messages": [{"role": "user", "content": "Hello there"}]}
RENDERED = "user: Hello there\nassistant:"


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server() as running:
        yield running


def test_a_message_is_a_chat_in_another_form(server: LiveServer) -> None:
    status, data = server.post(PATH, **BODY, model="fake")
    assert status == 200, data
    assert (data["type"], data["role"], data["model"]) == ("message", "assistant", "fake")
    assert data["content"] == [{"type": "text", "text": RENDERED}]
    assert (data["stop_reason"], data["stop_sequence"]) == ("max_tokens", None)
    count = len(ids_of(RENDERED))
    assert (data["usage"]["input_tokens"], data["usage"]["output_tokens"]) == (count, count)


def test_system_blocks_and_an_answer_that_is_begun(server: LiveServer) -> None:
    blocks = [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "Well"}]
    status, data = server.post(PATH, max_tokens=100, system="Be brief", messages=messages)
    assert status == 200, data
    assert data["content"][0]["text"] == "system: Be brief\nuser: Hi\nassistant: Well"


def test_parameters_reach_the_core(server: LiveServer) -> None:
    while not server.core.received.empty():
        server.core.received.get()
    fields = {"max_tokens": 3, "temperature": 0.7, "top_k": 5, "top_p": 0.6, "metadata": {"user_id": "ada"}}
    assert server.post(PATH, **{**BODY, **fields})[0] == 200
    sampling = server.core.expect(AddRequest).sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (3, 0.7, 5, 0.6)
    data = server.post(PATH, **BODY, stop_sequences=["there"])[1]
    assert data["content"][0]["text"] == "user: Hello "
    assert (data["stop_reason"], data["stop_sequence"]) == ("stop_sequence", "there")


def test_stream_has_the_events_of_anthropic(server: LiveServer) -> None:
    status, headers, body = server.request("POST", PATH, {**BODY, "stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    events = []
    for block in body.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert name == f"event: {parsed['type']}"
        events.append(parsed)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == RENDERED
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens"] == len(ids_of(RENDERED))


def test_count_tokens(server: LiveServer) -> None:
    status, data = server.post(f"{PATH}/count_tokens", messages=BODY["messages"], model="fake")
    assert (status, data) == (200, {"input_tokens": len(ids_of(RENDERED))})


@pytest.mark.parametrize("name", sorted(REFUSED_MESSAGES))
def test_what_is_not_supported_is_refused_by_its_name(server: LiveServer, name: str) -> None:
    assert name in MessagesRequest.__struct_fields__
    status, data = server.post(PATH, **BODY, **{name: {"surely": "not neutral"}})
    assert status == 400
    assert data["type"] == "error"
    assert data["error"]["type"] == "invalid_request_error"
    assert name in data["error"]["message"]
    for neutral in (None, *REFUSED_MESSAGES[name][0]):
        assert server.post(PATH, **BODY, **{name: neutral})[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"messages": BODY["messages"]}, 400, "invalid_request_error"),
        ({**BODY, "messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error"),
        ({**BODY, "messages": []}, 400, "invalid_request_error"),
        ({**BODY, "temperatur": 1}, 400, "invalid_request_error"),
        ({**BODY, "model": "other"}, 404, "not_found_error"),
    ],
)
def test_errors_are_in_anthropics_shape(
    server: LiveServer, body: dict[str, Any], status: int, kind: str
) -> None:
    found, data = server.post(PATH, **body)
    assert found == status, data
    assert data["error"]["type"] == kind


def test_errors_within_a_stream_are_events_of_it() -> None:
    with live_server(silent) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(10)
        body = json.dumps({**BODY, "stream": True}).encode()
        sock.sendall(
            b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(body)) + body
        )
        message = server.core.expect(AddRequest)
        server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}))
        read_until(sock, b"message_start")
        failure = RequestFailed(epoch=EPOCH, handle=message.handle, code="internal", message="it broke")
        server.core.send(failure)
        rest = read_until(sock, b"0\r\n\r\n")
        assert b"event: error\n" in rest
        assert b"it broke" in rest
