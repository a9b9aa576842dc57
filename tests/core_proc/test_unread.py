"""Frontends that do not read: they lose nothing, cost little, disturb nobody, and past a bound they are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tercet.core_proc import outbox
from tercet.ipc.errors import PeerBusyError
from tercet.ipc.messages import CheckInvariants, GetStats, Heartbeat
from tests.core_proc.harness import make_request
from tests.core_proc.local_engine import LocalEngine
from tests.core_proc.raw_frontend import RawFrontend
from tests.core_proc.test_core import ROOT, config, greedy, running, wait_for

TIMEOUT_S = 60.0


@contextmanager
def sleeping_frontend(address: str, max_tokens: int) -> Iterator[subprocess.Popen[str]]:
    """A frontend process that streams one request, and is stopped once its first token came."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.core_proc.raw_frontend", address, "1", str(max_tokens)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == f"{greedy(4, 1)[0]}\n"
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.communicate()


def wake(process: subprocess.Popen[str]) -> tuple[list[int], int, str, list[int]]:
    """What it reads then: its tokens, the number of messages that they came in, their end, and those after it."""
    process.send_signal(signal.SIGCONT)
    text, _ = process.communicate(timeout=TIMEOUT_S)
    lines = text.split("\n")
    at = next(i for i, line in enumerate(lines) if line.startswith("end"))
    tokens = [greedy(4, 1)[0], *map(int, lines[:at])]
    _, num_messages, end = lines[at].split()
    again = [int(token) for line in lines[at + 1 :] for token in line.split()[1:]]
    return tokens, int(num_messages), end, again


def resident_kib(pid: int) -> int:
    (line,) = (x for x in Path(f"/proc/{pid}/status").read_text().split("\n") if x.startswith("VmRSS"))
    return int(line.split()[1])


@pytest.mark.timeout(180)
def test_a_frontend_that_was_stopped_reads_every_token_in_few_messages() -> None:
    count = 8000
    with (
        running(config(audit=False)) as address,
        RawFrontend(address) as other,
    ):
        other.attach()
        assert other.welcome is not None
        with sleeping_frontend(address, count) as sleeper:
            before = resident_kib(other.welcome.pid)
            other.add(make_request([9, 8], handle=1, max_tokens=500))  # others are not held up
            other.read_all_finished(1)
            assert other.tokens[1] == greedy([9, 8], 500)
            other.read_until(lambda: other.stats().num_running == 0, TIMEOUT_S)
            assert resident_kib(other.welcome.pid) - before < 32 * 1024
            tokens, num_messages, end, _ = wake(sleeper)
        assert tokens == greedy(4, count)
        assert end == "LENGTH"
        assert num_messages < count / 2
        assert other.call(CheckInvariants()).error is None


@pytest.mark.timeout(180)
def test_past_the_bound_requests_end_and_the_frontend_reads_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_BACKLOG_BYTES", 64 * 1024)
    with LocalEngine(config(audit=False)) as engine, RawFrontend(engine.start().address) as other:
        other.attach()
        with sleeping_frontend(engine.address, 30_000) as sleeper:
            other.read_until(lambda: other.stats().num_aborted == 1, TIMEOUT_S)
            stats = other.stats()
            assert (stats.num_running, stats.kv_cache_usage, stats.num_frontends) == (0, 0.0, 2)
            other.add(make_request([9, 8], handle=1, max_tokens=100))
            other.read_all_finished(1)
            assert other.tokens[1] == greedy([9, 8], 100)
            tokens, num_messages, end, again = wake(sleeper)
        assert 256 < len(tokens) < 30_000, "what came before the bound is kept"
        assert tokens == greedy(4, len(tokens))
        assert (end, again) == ("unread", greedy(4, 5))
        assert num_messages < len(tokens)
        assert other.call(CheckInvariants()).error is None


@pytest.mark.timeout(180)
def test_a_frontend_that_only_asks_is_refused_and_then_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_BACKLOG_BYTES", 1024 * 1024)
    with LocalEngine(config(audit=False)) as engine, RawFrontend(engine.start().address) as other:
        other.attach()
        with RawFrontend(engine.address) as deaf:
            deaf.attach()
            deaf.add(make_request(4, handle=1, max_tokens=30_000))
            (it,) = (f for f in engine.core.frontends.by_peer.values() if f.slot == 2)
            ask_until(deaf, lambda: it.is_overrun)
            deaf.add(make_request(4, handle=2, max_tokens=3))
            deaf.read_all_finished(1, 2)
            assert (deaf.failures[1].code, deaf.failures[2].code) == ("unread", "queue_full")
            assert deaf.tokens[1] == greedy(4, len(deaf.tokens[1]))
            deaf.read_until(lambda: not it.is_overrun and it.backlog is None)
            deaf.add(make_request(4, handle=2, max_tokens=3))
            deaf.read_until(lambda: len(deaf.tokens[2]) == 3)

            ask_until(deaf, lambda: len(engine.core.frontends) == 1)
            other.add(make_request([9, 8], handle=1, max_tokens=100))
            other.read_all_finished(1)
            assert other.tokens[1] == greedy([9, 8], 100)
            while deaf.end.recv(0.5) is not None:  # once it reads again …
                pass
            deaf.end.send(Heartbeat(epoch=deaf.epoch))
            deaf.read_until(lambda: deaf.goodbye is not None)  # … it learns that it was let go
        assert other.call(CheckInvariants()).error is None


def ask_until(frontend: RawFrontend, condition: Any) -> None:
    """Ask and never read, until this is so."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        try:
            for _ in range(20):
                frontend.ask(GetStats())
        except PeerBusyError:
            pass
        time.sleep(0.002)  # so that few questions wait for the core when it is so


def test_garbage_is_counted_frame_by_frame_and_logged_now_and_then(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with LocalEngine() as engine, RawFrontend(engine.start().address) as other:
        other.attach()
        with RawFrontend(engine.address) as noisy:
            for _ in range(2000):
                noisy.end._socket.send(b"garbage")
            wait_for(lambda: engine.frontends.dropped == 2000)
        assert other.stats().dropped_messages == 2000
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "malformed" in warnings[0]


@pytest.mark.parametrize("message", [b"garbage", None], ids=["garbage", "requests"])
def test_a_flood_does_not_hold_up_the_others(message: bytes | None) -> None:
    """The flood goes on for as long as the other's request takes."""
    with LocalEngine(config(audit=False)) as engine, RawFrontend(engine.start().address) as other:
        other.attach()
        with flood(engine.address, message):
            other.add(make_request([9, 8], handle=1, max_tokens=50))
            other.read_all_finished(1)
        assert other.tokens[1] == greedy([9, 8], 50)


@contextmanager
def flood(address: str, message: bytes | None) -> Iterator[None]:
    """A process that sends these bytes, or Hellos, as fast as it can and reads nothing."""
    code = (
        "import sys, time; from tests.core_proc.raw_frontend import RawFrontend\n"
        "from tercet.ipc.errors import PeerBusyError\n"
        "end, message = RawFrontend(sys.argv[1]), sys.argv[2].encode()\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    try:\n"
        "        end.end._socket.send(message) if message else end.hello()\n"
        "    except PeerBusyError:\n"
        "        time.sleep(0.0001)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, address, (message or b"").decode()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()
