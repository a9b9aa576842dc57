"""The server at the level of HTTP: limits, keys, errors, disconnects, deadlines, draining, health."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from tercet.errors import ConfigError
from tercet.frontend.server.admission import Admission
from tercet.frontend.server.app import make_admin_app, make_app
from tercet.frontend.server.auth import OPEN_PATHS
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import ApiError
from tercet.frontend.server.limits import MAX_REQUEST_ID_CHARS, HttpLimits
from tercet.frontend.server.settings import AdmissionLimits, CorsSettings, ListenSettings, ServerSettings
from tercet.ipc.messages import Abort, AddRequest, Call, Finish, Reply, RequestFailed, Started, Stats
from tests.frontend.fake_core import EPOCH, FakeCore, logprob_columns, step_outputs
from tests.frontend.server.live_server import LiveServer, echo, events_of, live_server, silent
from tests.frontend.text_engine import ids_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BODY = {"prompt": "Hello there", "max_tokens": 50}
LIMITS = HttpLimits(max_url_bytes=200, max_header_bytes=2000, max_header_count=20, max_body_bytes=5000)


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with live_server(settings=ServerSettings(limits=LIMITS)) as running:
        yield running


def raw(server: LiveServer, data: bytes) -> bytes:
    """Send bytes, and read until the server closes; what it answers to a flood may be lost in its own closing."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20.0) as sock:
        received = b""
        try:
            sock.sendall(data)
            while chunk := sock.recv(65536):
                received += chunk
        except (BrokenPipeError, ConnectionResetError):
            received = received or b"HTTP/1.1 lost"
        return received


def until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# ---- limits, each at ±1 and far beyond


def padded(size: int) -> bytes:
    """A completion request whose body has exactly so many bytes."""
    body = json.dumps({"prompt": [5, 6], "user": ""}).encode()
    return body[:-2] + b"x" * (size - len(body)) + body[-2:]


@pytest.mark.parametrize(("size", "status"), [(4999, 200), (5000, 200), (5001, 413), (5000 * 10**6, 413)])
def test_body_limit(server: LiveServer, size: int, status: int) -> None:
    if size <= 10**4:
        assert server.request("POST", COMPLETIONS, padded(size))[0] == status
        return
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode()
    assert raw(server, head + b"x" * 1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(("size", "status"), [(5000, b"200"), (5001, b"413")])
def test_body_limit_of_chunks_that_announce_no_length(server: LiveServer, size: int, status: bytes) -> None:
    body = padded(size)
    data = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n".encode()
    data += b"transfer-encoding: chunked\r\n\r\n"
    for start in range(0, size, 1000):
        piece = body[start : start + 1000]
        data += b"%x\r\n%b\r\n" % (len(piece), piece)
    assert raw(server, data + b"0\r\n\r\n").split(b" ")[1] == status


@pytest.mark.parametrize(("size", "status"), [(199, 404), (200, 404), (201, 414), (200 * 10**4, 414)])
def test_url_limit(server: LiveServer, size: int, status: int) -> None:
    request = b"GET /%b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % (b"a" * (size - 1))
    received = raw(server, request)
    expected = (
        (b"414", b"431", b"lost") if size > 10**5 else (b"%d" % status,)
    )  # cut off while it still comes
    assert received.split(b" ")[1] in expected


@pytest.mark.parametrize(
    ("size", "status"), [(1999, b"200"), (2000, b"200"), (2001, b"431"), (2 * 10**7, b"431")]
)
def test_header_size_limit(server: LiveServer, size: int, status: bytes) -> None:
    fixed = len("host") + 1 + len("connection") + len("close") + len("x-pad")
    request = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-pad: %b\r\n\r\n"
    expected = (status, b"lost") if size > 10**5 else (status,)
    assert raw(server, request % (b"a" * (size - fixed))).split(b" ")[1] in expected


@pytest.mark.parametrize(("count", "status"), [(19, b"200"), (20, b"200"), (21, b"431"), (10**5, b"431")])
def test_header_count_limit(server: LiveServer, count: int, status: bytes) -> None:
    request = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    request += b"".join(b"x%d: \r\n" % i for i in range(count - 2))
    expected = (status, b"lost") if count > 10**4 else (status,)
    assert raw(server, request + b"\r\n").split(b" ")[1] in expected


@pytest.mark.parametrize(("size", "status"), [(MAX_REQUEST_ID_CHARS, 200), (MAX_REQUEST_ID_CHARS + 1, 400)])
def test_request_id_limit(server: LiveServer, size: int, status: int) -> None:
    assert server.request("POST", COMPLETIONS, BODY, {"X-Request-Id": "r" * size})[0] == status


def test_a_refusal_by_size_is_in_openais_shape_and_leaves_the_server_as_it_was(server: LiveServer) -> None:
    status, headers, data = server.request("POST", COMPLETIONS, padded(6000))
    assert status == 413
    assert headers["connection"] == "close"
    assert json.loads(data)["error"]["code"] == "body_too_long"
    assert server.post(COMPLETIONS, **BODY)[0] == 200
    assert server.context.admission.num_bytes == 0


def test_a_head_or_body_that_does_not_come_is_not_waited_for() -> None:
    limits = HttpLimits(head_timeout_s=0.2, body_timeout_s=0.2)
    with live_server(settings=ServerSettings(limits=limits)) as server:
        assert raw(server, b"GET /version HT").startswith(b"HTTP/1.1 408 ")
        head = f"POST {COMPLETIONS} HTTP/1.1\r\ncontent-length: 100\r\n\r\n".encode()
        assert raw(server, head + b"{").startswith(b"HTTP/1.1 408 ")
        until(lambda: server.context.admission.num_bytes == 0)


def test_a_client_that_does_not_read_is_given_up() -> None:
    limits = HttpLimits(write_timeout_s=0.3)
    with (
        live_server(silent, ServerSettings(limits=limits)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        send_stream(sock, CHAT, logprobs=True, top_logprobs=20, n=32)
        message = server.core.expect(AddRequest)
        handles = range(message.handle, message.handle + 32)
        tokens = ids_of("a") * 8
        for first in range(0, 400, 8):  # megabytes of log-probabilities, more than sockets hold
            row = [(tokens[0], -1.0), *((token, -2.0) for token in range(20))]
            columns = logprob_columns([(handle, row, 1) for handle in handles for _ in tokens])
            server.core.send(step_outputs(dict.fromkeys(handles, tokens), first=first, logprobs=columns))
        assert server.core.expect(Abort, timeout_s=30).handles.tolist() == list(handles)
        until(lambda: not server.context.guards)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 4000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b"null",
    ],
)
def test_bodies_that_are_no_request(server: LiveServer, body: bytes) -> None:
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        status, _, data = server.request("POST", path, body)
        assert status == 400, data
        assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}


def test_unknown_routes_and_methods(server: LiveServer) -> None:
    status, data = server.get("/v1/nothing")
    assert status == 404
    assert "/v1/nothing" in data["error"]["message"]
    status, data = server.get(CHAT)
    assert status == 405
    assert "GET" in data["error"]["message"]


# ---- keys and origins


def test_every_route_but_the_probes_asks_for_a_key() -> None:
    settings = ServerSettings(api_keys=("first", "second"))
    with live_server(settings=settings) as server:
        context = ServerContext(settings)
        paths = {getattr(route, "path", "") for route in make_app(context).routes}
        assert paths >= {
            CHAT,
            COMPLETIONS,
            "/v1/models",
            "/progress",
            "/server_info",
            "/tokenize",
            *OPEN_PATHS,
        }
        for path in paths | {"/nothing", "/", "//health", "/health/", "/HEALTH"}:
            status = server.request("GET", path.replace("{name:path}", "fake"))[0]
            assert (status == 401) == (path not in OPEN_PATHS), path
        for key in ("first", "second"):
            assert server.get("/v1/models", {"Authorization": f"Bearer {key}"})[0] == 200
            assert server.get("/v1/models", {"x-api-key": key})[0] == 200
        for value in ("Bearer third", "Bearer", "Bearer firs", "Basic first", "first", "Bearer f\xefrst"):
            status, data = server.get("/v1/models", {"Authorization": value})
            assert status == 401
            assert data["error"]["code"] == "invalid_api_key"
        for path in {getattr(route, "path", "") for route in make_admin_app(context).routes}:
            assert server.request("POST", path)[0] == 401  # and not here even with a key
            assert server.request("POST", path, None, {"x-api-key": "first"})[0] in (404, 405)


def test_no_origin_is_allowed_unless_it_is_named(server: LiveServer) -> None:
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in server.request("OPTIONS", CHAT, None, preflight)[1]
    cors = CorsSettings(allowed_origins=("https://page.example",))
    with live_server(settings=ServerSettings(cors=cors, api_keys=("k",))) as allowing:
        status, headers, _ = allowing.request("OPTIONS", CHAT, None, preflight)
        assert status == 200
        assert headers["access-control-allow-origin"] == "https://page.example"
        other = {**preflight, "Origin": "https://other.example"}
        assert "access-control-allow-origin" not in allowing.request("OPTIONS", CHAT, None, other)[1]


# ---- streams


def test_deltas_that_come_together_leave_in_one_write() -> None:
    # The core sends ten steps at once, in one message: one event holds their text.
    def answer(message: AddRequest) -> list[msgspec.Struct]:
        tokens = ids_of("one two three four")
        return [step_outputs({message.handle: tokens}, finish={message.handle: Finish.LENGTH})]

    with live_server(answer) as server:
        events = server.stream(COMPLETIONS, **BODY)
        assert [event["choices"][0]["text"] for event in events[:-1]] == ["one two three four"]


def test_the_first_token_is_not_held_back() -> None:
    with live_server(silent) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(10)
        send_stream(sock)
        message = server.core.expect(AddRequest)
        server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}))
        assert b'"text"' in read_until(sock, b"\n\n")  # though the core says no more
        server.core.send(
            step_outputs({message.handle: ids_of("!")}, first=1, finish={message.handle: Finish.EOS})
        )
        assert b"[DONE]" in read_until(sock, b"0\r\n\r\n")


def send_stream(sock: socket.socket, path: str = COMPLETIONS, **fields: Any) -> None:
    subject = {"messages": [{"role": "user", "content": "Hello"}]} if path == CHAT else BODY
    body = json.dumps({**subject, "stream": True, **fields}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body)


def read_until(sock: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = sock.recv(65536)
        assert chunk, received
        received += chunk
    return received


def test_errors_within_a_stream_are_events_of_it() -> None:
    with live_server(silent) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(10)
        send_stream(sock)
        message = server.core.expect(AddRequest)
        server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}))
        read_until(sock, b"\n\n")
        failure = RequestFailed(epoch=EPOCH, handle=message.handle, code="internal", message="it broke")
        server.core.send(failure)
        rest = read_until(sock, b"0\r\n\r\n").decode()
        assert '"message":"it broke"' in rest
        assert rest.index("it broke") < rest.index("data: [DONE]")


def test_errors_before_a_stream_have_their_own_status() -> None:
    codes = {"queue_full": 429, "internal": 500, "invalid": 400, "shutdown": 503}
    code = ""

    def answer(message: AddRequest) -> list[msgspec.Struct]:
        return [RequestFailed(epoch=EPOCH, handle=message.handle, code=code, message="n: no")]

    with live_server(answer) as server:
        for code, status in codes.items():  # noqa: B007  (read by the answer)
            for stream in (False, True):
                found, headers, data = server.request("POST", COMPLETIONS, {**BODY, "stream": stream})
                assert found == status
                assert ("retry-after" in headers) == (status in (429, 503))
                assert json.loads(data)["error"]["message"]


def test_silent_streams_get_comments() -> None:
    settings = ServerSettings(sse_keep_alive_s=0.05)
    with (
        live_server(silent, settings) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.settimeout(10)
        send_stream(sock)
        received = read_until(sock, b": keep-alive\n\n")  # before the first token
        assert received.startswith(b"HTTP/1.1 200 ")
        message = server.core.expect(AddRequest)
        server.core.send(
            step_outputs({message.handle: ids_of("Hi")[:1]}, finish={message.handle: Finish.EOS})
        )
        assert b"[DONE]" in read_until(sock, b"0\r\n\r\n")


# ---- disconnects, deadlines, overload


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_client_that_leaves_before_the_first_token_is_noticed(path: str, stream: bool) -> None:
    with live_server(silent) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            send_stream(sock, path, stream=stream, n=2)
            message = server.core.expect(AddRequest)
        abort = server.core.expect(Abort)
        assert sorted(abort.handles.tolist()) == [message.handle, message.handle + 1]
        until(lambda: server.context.admission.num_requests == 0 and not server.context.guards)


def test_a_client_that_leaves_within_its_stream_is_noticed() -> None:
    with live_server(silent) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            send_stream(sock)
            message = server.core.expect(AddRequest)
            server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}))
            read_until(sock, b"\n\n")
        assert server.core.expect(Abort).handles.tolist() == [message.handle]


def test_a_client_that_has_sent_its_next_request_and_leaves_is_noticed() -> None:
    with live_server(silent) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            send_stream(sock)
            message = server.core.expect(AddRequest)
            send_stream(sock)  # waits for its turn
            time.sleep(0.1)
        assert server.core.expect(Abort).handles.tolist() == [message.handle]
        until(lambda: not server.context.guards and server.context.admission.num_requests == 0)


def test_many_clients_that_leave_at_random_leave_nothing_behind() -> None:
    rng = np.random.default_rng(1)

    def answer(message: AddRequest) -> list[msgspec.Struct]:
        return echo(message) if message.handle % 3 else []

    with live_server(answer) as server:
        for _ in range(60):
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                send_stream(sock)
                time.sleep(float(rng.uniform(0, 0.01)))
        until(lambda: not server.context.guards and server.context.admission.num_requests == 0)
        assert server.context.engine.get_num_unfinished_requests() == 0
        assert server.context.admission.num_bytes == 0
        assert server.context.admission.num_waiting_prompt_tokens == 0


def test_a_deadline_ends_a_request_before_and_within_its_stream() -> None:
    with live_server(silent) as server:
        status, _, data = server.request("POST", COMPLETIONS, BODY, {"X-Request-Timeout": "0.1"})
        assert status == 504
        assert json.loads(data)["error"]["code"] == "deadline_exceeded"
        server.core.expect(Abort)
        for wrong in ("0", "-1", "soon", "nan"):
            assert server.request("POST", COMPLETIONS, BODY, {"X-Request-Timeout": wrong})[0] == 400
    with live_server(silent, ServerSettings(request_timeout_s=0.3)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.settimeout(10)
            send_stream(sock)
            message = server.core.expect(AddRequest)
            server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}))
            rest = read_until(sock, b"0\r\n\r\n")
            assert rest.index(b"deadline_exceeded") < rest.index(b"[DONE]")
        assert server.core.expect(Abort).handles.tolist() == [message.handle]


@pytest.mark.parametrize(
    ("limits", "fits", "too_much"),
    [
        (AdmissionLimits(max_requests=4), {"n": 4}, {"n": 5}),
        (AdmissionLimits(max_requests=4), {"prompt": ["a"] * 4}, {"prompt": ["a"] * 5}),
        (AdmissionLimits(max_requests=4), {"prompt": ["a"] * 2, "n": 2}, {"prompt": ["a"] * 3, "n": 2}),
        (AdmissionLimits(max_waiting_prompt_tokens=8), {"prompt": [5] * 8}, {"prompt": [5] * 9}),
        (AdmissionLimits(max_body_bytes_in_flight=60), {"user": "x" * 10}, {"user": "x" * 60}),
    ],
)
def test_admission_limits(limits: AdmissionLimits, fits: dict[str, Any], too_much: dict[str, Any]) -> None:
    with live_server(settings=ServerSettings(admission=limits)) as server:
        for _ in range(3):  # what has ended counts no more
            assert server.post(COMPLETIONS, **{"prompt": "a", **fits})[0] == 200
        status, headers, data = server.request("POST", COMPLETIONS, {"prompt": "a", **too_much})
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert json.loads(data)["error"]["code"] == "server_overloaded"
        assert server.context.admission.num_refused == 1


def test_a_full_server_refuses_at_once_and_is_not_ready() -> None:
    settings = ServerSettings(admission=AdmissionLimits(max_requests=1))
    with (
        live_server(silent, settings) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        send_stream(sock)
        server.core.expect(AddRequest)
        assert server.get("/ready") == (503, {"status": "full"})
        assert server.get("/health")[0] == 200
        started_s = time.monotonic()
        assert server.post(COMPLETIONS, **BODY)[0] == 429
        assert time.monotonic() - started_s < 0.1
        sock.close()
        until(lambda: server.get("/ready")[0] == 200)


def test_tickets_may_be_released_twice() -> None:
    admission = Admission(AdmissionLimits(max_requests=2))
    ticket = admission.admit(10)
    ticket.count(2, 7)
    with pytest.raises(ApiError):
        admission.admit(1)
    ticket.release()
    ticket.release()
    assert (admission.num_requests, admission.num_bytes, admission.num_waiting_prompt_tokens) == (0, 0, 0)


# ---- the end


def test_draining_lets_streams_end_and_refuses_new_requests() -> None:
    listen = ListenSettings(shutdown_timeout_s=20)
    with (
        live_server(silent, listen=listen) as server,
        socket.create_connection(("127.0.0.1", server.port)) as sock,
    ):
        sock.settimeout(10)
        send_stream(sock)
        message = server.core.expect(AddRequest)
        assert server.api is not None
        server.run(server.api.stop)
        until(lambda: _refused(server))
        done = {message.handle: Finish.EOS}
        server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}, finish=done))
        rest = read_until(sock, b"0\r\n\r\n")
        assert b'"finish_reason":"stop"' in rest
        assert b"[DONE]" in rest


def _refused(server: LiveServer) -> bool:
    try:
        return server.get("/ready")[0] == 503
    except OSError:
        return True


def test_every_stream_gets_a_last_word_when_the_time_to_drain_is_over() -> None:
    with live_server(silent, listen=ListenSettings(shutdown_timeout_s=0.2)) as server:
        socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
        for sock in socks:
            sock.settimeout(10)
            send_stream(sock)
        for _ in socks:
            message = server.core.expect(AddRequest)
            server.core.send(step_outputs({message.handle: ids_of("Hi")[:1]}))
        for sock in socks:
            read_until(sock, b"\n\n")
        with socket.create_connection(("127.0.0.1", server.port)) as whole:
            whole.settimeout(10)
            send_stream(whole, stream=False)
            server.core.expect(AddRequest)
            assert server.api is not None
            server.run(server.api.stop)
            for sock in socks:
                rest = read_until(sock, b"0\r\n\r\n")
                assert rest.index(b"shutting_down") < rest.index(b"[DONE]")
                sock.close()
            assert whole.recv(65536).startswith(b"HTTP/1.1 503 ")


# ---- health


def test_probes_of_a_healthy_server_ask_the_engine_nothing(server: LiveServer) -> None:
    while not server.core.received.empty():
        server.core.received.get()
    for _ in range(100):
        assert server.get("/health") == (200, {"status": "ok"})
    assert server.get("/ready") == (200, {"status": "ok"})
    assert server.get("/progress")[1]["phase"] == "running"
    assert server.request("POST", "/ping")[0] == 200
    while not server.core.received.empty():
        assert not isinstance(server.core.received.get(), (AddRequest, Call))


def make_stats(step: int, num_running: int) -> Stats:
    numbers = {name: 0 for name in Stats.__struct_fields__ if Stats.__annotations__[name] in ("int", "float")}
    return Stats(**{**numbers, "epoch": EPOCH, "step": step, "num_running": num_running})


def test_an_engine_that_stands_still_or_is_silent_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tercet.frontend.server.context.STALLED_S", 0.2)
    monkeypatch.setattr("tercet.frontend.server.context.SILENT_S", 0.4)
    with live_server(welcome={"heartbeat_s": 0.05}) as server:
        server.core.send(make_stats(step=3, num_running=2))
        until(lambda: server.get("/progress")[1]["step"] == 3)
        until(lambda: server.get("/ready") == (503, {"status": "stalled"}))
        assert server.get("/health")[0] == 200
        server.core.send(make_stats(step=4, num_running=2))
        until(lambda: server.get("/ready")[0] == 200)
        server.core.send(make_stats(step=4, num_running=0))  # idle: nothing has to move
        until(lambda: server.get("/ready") == (503, {"status": "silent"}))
        assert server.get("/progress")[1]["heartbeat_age_s"] > 0.4


def test_a_dead_engine_is_told_to_everyone() -> None:
    with live_server(silent) as server, socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(10)
        send_stream(sock, stream=False)
        server.core.expect(AddRequest)
        server.run(lambda: server.context.engine._client.die("a test said so"))
        assert sock.recv(65536).startswith(b"HTTP/1.1 503 ")
        assert server.get("/health")[0] == 503
        assert server.get("/ready") == (503, {"status": "dead"})
        assert server.request("GET", "/ping")[0] == 503
        status, data = server.post(COMPLETIONS, **BODY)
        assert (status, data["error"]["code"]) == (503, "engine_unavailable")


def test_before_the_engine_is_there_the_server_says_so() -> None:
    from starlette.testclient import TestClient

    with TestClient(make_app(ServerContext(ServerSettings()))) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").json() == {"status": "starting"}
        assert client.get("/progress").json()["phase"] == "starting"
        for path in (CHAT, COMPLETIONS, "/tokenize"):
            response = client.post(path, json={"prompt": "x"})
            assert response.status_code == 503
            assert response.headers["retry-after"]
        assert client.get("/v1/models").status_code == 503


# ---- what else there is


def test_models(server: LiveServer) -> None:
    status, data = server.get("/v1/models")
    assert status == 200
    (model,) = data["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 512)
    assert server.get("/v1/models/fake") == (200, model)
    assert server.get("/v1/models/other")[0] == 404


def test_tokenize_and_detokenize(server: LiveServer) -> None:
    ids = ids_of("Hello there")
    status, data = server.post("/tokenize", prompt="Hello there", return_token_strs=True)
    assert (status, data["tokens"], data["count"], data["max_model_len"]) == (200, ids, len(ids), 512)
    assert len(data["token_strs"]) == len(ids)
    messages = [{"role": "user", "content": "Hi"}]
    assert server.post("/tokenize", messages=messages)[1]["tokens"] == ids_of("user: Hi\nassistant:")
    assert server.post("/detokenize", tokens=ids) == (200, {"prompt": "Hello there"})
    for wrong in ({}, {"prompt": "x", "messages": messages}, {"prompt": 1}):
        assert server.post("/tokenize", **wrong)[0] == 400
    assert server.post("/detokenize", tokens=[10**6])[0] == 400


def test_version_and_server_info(server: LiveServer) -> None:
    assert server.get("/version")[0] == 200
    status, data = server.get("/server_info")
    assert status == 200
    assert data["server_limits"]["max_body_bytes"] == LIMITS.max_body_bytes
    assert data["engine_limits"]["block_size"] == 16


def test_templates_of_requests_are_refused_by_default(server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ messages }}"}
    for path in (CHAT, "/tokenize"):
        status, data = server.post(path, **body)
        assert status == 400
        assert data["error"]["param"] == "chat_template"


def test_cached_tokens_are_in_the_usage() -> None:
    def answer(message: AddRequest) -> list[msgspec.Struct]:
        started = Started(
            handle=np.array([message.handle], np.uint64),
            num_cached_tokens=np.array([4], np.int32),
            queue_s=np.zeros(1, np.float32),
            prefill_s=np.zeros(1, np.float32),
        )
        return [step_outputs({message.handle: [5]}, finish={message.handle: Finish.EOS}, started=started)]

    with live_server(answer) as server:
        data = server.post(COMPLETIONS, **BODY)[1]
        assert data["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


def test_admin_routes_reach_the_core() -> None:
    from starlette.testclient import TestClient

    from tercet.frontend.async_llm import AsyncLLM

    class AnsweringCore(FakeCore):
        def _replies(self, message: Any) -> list[msgspec.Struct]:
            if isinstance(message, Call):
                return [Reply(epoch=EPOCH, call_id=message.call_id)]
            return super()._replies(message)

    with AnsweringCore() as core:
        context = ServerContext(ServerSettings())
        with TestClient(make_admin_app(context)) as client:
            assert client.portal is not None
            client.portal.call(context.attach, AsyncLLM(core.address))
            for path in ("pause?mode=keep&clear_cache=false", "resume", "reset_prefix_cache"):
                assert client.post(f"/{path}").status_code == 200
                core.expect(Call)
            assert client.post("/pause?mode=sideways").status_code == 400
            assert client.post("/pause?clear_cache=perhaps").status_code == 400
            assert client.get("/is_paused").json() == {"is_paused": False}
            client.portal.call(context.close)


def test_settings_that_cannot_work_are_refused() -> None:
    for make in (
        lambda: HttpLimits(max_body_bytes=0),
        lambda: AdmissionLimits(max_requests=-1),
        lambda: ServerSettings(api_keys=("",)),
        lambda: ServerSettings(request_timeout_s=-1),
        lambda: ServerContext(ServerSettings(chat_template="{% for %}")),
    ):
        with pytest.raises(ConfigError):
            make()


def test_events_are_framed(server: LiveServer) -> None:
    status, headers, data = server.request("POST", COMPLETIONS, {**BODY, "stream": True})
    assert status == 200
    assert headers["transfer-encoding"] == "chunked"
    assert headers["cache-control"] == "no-cache"
    assert events_of(data)[-1] == "[DONE]"
