"""`tercet serve` as processes: start, signals, attaching, several API servers, sockets, TLS, configuration."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.server_tools import ServerProcess, fetch, serve, until
from tests.tercet import cli_tools
from tests.tercet.cli_tools import ROOT, TERCET, environment, simulated_flags, write_tokenizer

pytestmark = pytest.mark.timeout(180)

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "some words", "max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(tokenizer: Path) -> Iterator[str]:
    """Address of an engine that takes 5 ms a step."""
    with cli_tools.engine(*simulated_flags(tokenizer, step_us=5000)) as (_, address):
        yield address


class Stream(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, url: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self.body = {**LONG, **body, "stream": True}
        self.url = url
        self.data = b""
        self.started = threading.Event()
        self.start()
        assert self.started.wait(30)

    def run(self) -> None:
        host = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request("POST", COMPLETIONS, json.dumps(self.body))
            response = connection.getresponse()
            while chunk := response.read1(65536):
                self.data += chunk
                self.started.set()
        except (OSError, http.client.HTTPException):
            pass
        finally:
            self.started.set()
            connection.close()


def test_a_signal_ends_streams_with_a_last_word_and_the_process_with_0(tokenizer: Path) -> None:
    with serve(*simulated_flags(tokenizer, step_us=5000)) as server:
        streams = [Stream(server.url) for _ in range(16)]
        family = cli_tools.descendants(server.process.pid)
        assert len(family) == 2  # core and worker
        code, words = server.stop(signal.SIGTERM)
        assert code == 0, words
        for stream in streams:
            stream.join(30)
            assert stream.data.endswith(b"data: [DONE]\n\n")
            assert b"shutting_down" in stream.data
        cli_tools.wait_gone(family)


def test_the_shutdown_timeout_lets_streams_end_by_themselves(engine: str) -> None:
    with serve("--connect", engine, "--shutdown-timeout", "30") as server:
        stream = Stream(server.url, max_tokens=200)
        code, words = server.stop(signal.SIGINT)
        assert code == 0, words
        stream.join(30)
        assert b'"finish_reason":"length"' in stream.data
        assert b"shutting_down" not in stream.data


def test_a_second_signal_is_immediate(engine: str) -> None:
    with serve("--connect", engine, "--shutdown-timeout", "60") as server:
        Stream(server.url)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/ready")[0] == 0)
        assert server.stop(signal.SIGTERM)[0] == 128 + signal.SIGTERM


def test_the_port_answers_while_the_engine_starts_and_a_signal_ends_the_start(tokenizer: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [*simulated_flags(tokenizer), "--port", str(port)]
    process = subprocess.Popen(
        [*TERCET, "serve", *flags], stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: fetch(f"{url}/health")[0] == 200)
        status, ready = fetch(f"{url}/ready")
        if status == 503:  # else the start was over before we looked
            assert ready == {"status": "starting"}
            assert fetch(f"{url}/v1/models")[0] == 503
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=30)
        assert process.returncode == 0, words
    finally:
        process.kill()
        process.communicate()


def test_an_engine_that_dies_ends_the_server(tokenizer: Path) -> None:
    with serve(*simulated_flags(tokenizer, step_us=5000)) as server:
        stream = Stream(server.url)
        cli_tools.descendants(server.process.pid)[0].kill()
        _, words = server.process.communicate(timeout=30)
        assert server.process.returncode == 1
        assert "died" in words
        stream.join(30)
        assert stream.data.endswith(b"data: [DONE]\n\n")
        assert b"engine_unavailable" in stream.data


def test_a_model_that_cannot_start_is_said_in_one_line(tmp_path: Path) -> None:
    done = cli_tools.run("serve", str(tmp_path / "nothing"), "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("tercet: error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--api-server-count", "0"], "api_server_count"),
        (["--api-server-count", "2", "--uds", "/tmp/x.sock"], "api_server_count"),
        (["--connect", "ipc:///nowhere/at/all", "--max-model-len", "8"], "max-model-len"),
        (["--connect", "ipc:///nowhere/at/all"], "connect"),
        (["--enable-admin-routes"], "enable_admin_routes"),
        (["--admin-port", "1"], "admin_port"),
        (["--ssl-keyfile", "x"], "ssl_keyfile"),
        (["--ssl-certfile", "/nowhere"], "ssl_certfile"),
        (["--chat-template", "/nowhere"], "chat_template"),
        (["--chat-template", "{% if %}"], "chat_template"),
        (["--port", "65536"], "port"),
        (["--host", "no.such.host.invalid"], "host"),
        (["--max-body-bytes", "0"], "max_body_bytes"),
        (["--config", "/nowhere.yaml"], "config"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], word: str) -> None:
    done = cli_tools.run("serve", *flags, *([] if "--connect" in flags else ["--device", "simulated"]))
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_port_in_use_is_said(engine: str) -> None:
    with serve("--connect", engine) as server:
        port = server.url.rpartition(":")[2]
        done = cli_tools.run("serve", "--connect", engine, "--port", port)
        assert done.returncode == 2
        assert "port" in done.stderr


# ---- several API servers


def answering_pids(server: ServerProcess, tries: int = 60) -> set[int]:
    return {server.get("/server_info")[1]["pid"] for _ in range(tries)}


def test_three_api_servers_share_a_port_and_outlive_each_other(tokenizer: Path) -> None:
    flags = simulated_flags(tokenizer, step_us=2000)
    with serve(*flags, "--api-server-count", "3") as server:
        until(lambda: all(server.get("/ready")[0] == 200 for _ in range(12)))
        pids = answering_pids(server)
        assert len(pids) == 3
        family = cli_tools.descendants(server.process.pid)
        assert pids <= {process.pid for process in family}
        victim = min(pids)
        streams = [Stream(server.url, max_tokens=600) for _ in range(12)]
        os.kill(victim, signal.SIGKILL)
        for stream in streams:
            stream.join(60)
        whole = [stream for stream in streams if b'"finish_reason":"length"' in stream.data]
        assert whole  # those of the others went on
        until(lambda: len(answering_pids(server) - {victim}) == 3)  # a new one has taken its place
        assert server.post(COMPLETIONS, prompt="some", max_tokens=2)[0] == 200
        family = cli_tools.descendants(server.process.pid)
        code, words = server.stop(signal.SIGTERM)
        assert code == 0, words
        cli_tools.wait_gone(family)


def test_frontends_come_and_go_while_others_stream(engine: str) -> None:
    with serve("--connect", engine) as first:
        stream = Stream(first.url, max_tokens=300)
        for _ in range(2):
            with serve("--connect", engine) as second:
                assert second.post(COMPLETIONS, prompt="some", max_tokens=2)[0] == 200
                assert second.stop(signal.SIGTERM)[0] == 0
        stream.join(60)
        assert b'"finish_reason":"length"' in stream.data


def test_a_killed_parent_leaves_nothing_behind(tokenizer: Path) -> None:
    with serve(*simulated_flags(tokenizer), "--api-server-count", "2") as server:
        family = cli_tools.descendants(server.process.pid)
        assert len(family) == 4
        server.process.kill()
        server.process.wait()
        cli_tools.wait_gone(family)


# ---- doors


def unix_get(path: Path, target: str, method: str = "GET") -> tuple[int, Any]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(f"{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


def test_unix_sockets_of_the_server_and_of_its_admin_routes(engine: str, tmp_path: Path) -> None:
    main, admin = tmp_path / "main.sock", tmp_path / "admin.sock"
    flags = ["--connect", engine, "--uds", str(main), "--enable-admin-routes", "--admin-uds", str(admin)]
    with serve(*flags, port=False) as server:
        assert server.url == f"unix:{main}"
        assert main.stat().st_mode & 0o777 == 0o600
        assert unix_get(main, "/ready")[0] == 200
        assert unix_get(main, "/pause", "POST")[0] == 404
        assert unix_get(admin, "/pause?mode=keep", "POST") == (200, {"status": "paused"})
        assert unix_get(admin, "/is_paused") == (200, {"is_paused": True})
        assert unix_get(admin, "/resume", "POST")[0] == 200
        assert unix_get(admin, "/reset_prefix_cache", "POST") == (200, {"success": True})
        assert unix_get(admin, "/start_profile", "POST")[0] == 503  # no directory to write to
        assert server.stop(signal.SIGTERM)[0] == 0
    assert not main.exists()
    assert not admin.exists()


def test_the_only_listener_is_on_loopback(engine: str) -> None:
    with serve("--connect", engine, "--enable-admin-routes", "--admin-port", "0") as server:
        found = [
            connection.laddr.ip
            for process in [psutil.Process(server.process.pid), *cli_tools.descendants(server.process.pid)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert found == ["127.0.0.1", "127.0.0.1"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_tls_with_and_without_client_certificates(engine: str, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    extension = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*command, *extension, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True
    )
    files = ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]
    trusting = ssl.create_default_context(cafile=str(cert))
    with serve("--connect", engine, *files) as server:
        assert server.url.startswith("https://")
        assert _https_status(server.url, trusting) == 200
    mutual = [*files, "--ssl-ca-certs", str(cert), "--ssl-cert-reqs", "2"]
    with serve("--connect", engine, *mutual) as server:
        with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
            _https_status(server.url, trusting)
        trusting.load_cert_chain(cert, key)
        assert _https_status(server.url, trusting) == 200


def _https_status(url: str, context: ssl.SSLContext) -> int:
    connection = http.client.HTTPSConnection(url.removeprefix("https://"), timeout=20, context=context)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status
    finally:
        connection.close()


def test_options_from_a_file_and_the_command_line(engine: str, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1].content }}")
    config = tmp_path / "serve.yaml"
    config.write_text(
        f"connect: {engine}\nport: 1\nserved_model_name: [one, two]\nmax-body-bytes: 1k\n"
        f"chat-template: {template}\ntrust-request-chat-template: false\nallowed-origins: ['https://a.example']\n"
    )
    with serve("--config", str(config)) as server:  # --port 0 goes before the file's 1
        assert server.model == "one"
        assert server.get("/server_info")[1]["server_limits"]["max_body_bytes"] == 1000
        body = {"messages": [{"role": "user", "content": "some words"}]}
        text = server.post("/tokenize", **body)[1]["tokens"]
        assert server.post("/detokenize", tokens=text)[1]["prompt"] == "some words"
        assert server.post("/tokenize", prompt="x" * 2000)[0] == 413
    config.write_text("- not a mapping\n")
    done = cli_tools.run("serve", "--config", str(config))
    assert done.returncode == 2
    assert "config" in done.stderr


def test_a_start_that_waits_is_quick_to_answer(engine: str) -> None:
    started_s = time.monotonic()
    with serve("--connect", engine) as server:
        assert server.get("/health")[0] == 200
        assert time.monotonic() - started_s < 30
