"""The core process as its frontends see it: real sockets, a real process, a simulated worker."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tercet.config import EngineArgs, EngineConfig, SimulationConfig
from tercet.frontend.launcher import EngineProcesses
from tercet.ipc.messages import (
    Abort,
    AddRequest,
    CheckInvariants,
    Finish,
    GetStats,
    Heartbeat,
    PauseGeneration,
    PauseMode,
    ResetPrefixCache,
    ResumeGeneration,
    Sampling,
)
from tercet.worker_proc.simulated_runner import expected_tokens
from tests.core_proc.harness import VOCAB_SIZE, make_request
from tests.core_proc.raw_frontend import RawFrontend

ROOT = Path(__file__).resolve().parents[2]
MAX_MODEL_LEN = 40_000


def config(*, async_scheduling: bool = True, **changes: Any) -> EngineConfig:
    args = EngineArgs(
        device="simulated",
        max_model_len=MAX_MODEL_LEN,
        block_size=16,
        max_num_seqs=16,
        num_gpu_blocks_override=4096,
        hf_overrides={"vocab_size": VOCAB_SIZE},
        async_scheduling=async_scheduling,
        simulation=SimulationConfig(step_us=100.0),
        audit=True,
    )
    return dataclasses.replace(args, **changes).create_engine_config()


@contextmanager
def running(engine_config: EngineConfig) -> Iterator[str]:
    processes = EngineProcesses(engine_config, log_level="ERROR")
    try:
        processes.start()
        yield processes.address
    finally:
        processes.stop()


@pytest.fixture(scope="module", params=[True, False], ids=["overlapped", "plain"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(config(async_scheduling=request.param)) as found:
        yield found


@pytest.fixture
def frontend(address: str) -> Iterator[RawFrontend]:
    with RawFrontend(address) as end:
        end.attach()
        yield end
        assert end.call(CheckInvariants()).error is None
        assert end.end.dropped == 0


@pytest.fixture
def other(address: str) -> Iterator[RawFrontend]:
    with RawFrontend(address) as end:
        yield end.attach()


def greedy(prompt: list[int] | int, count: int) -> list[int]:
    tokens = list(range(1, 1 + prompt)) if isinstance(prompt, int) else prompt
    return expected_tokens(tokens, count, VOCAB_SIZE)


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------ requests


def test_requests_stream_to_their_end(frontend: RawFrontend) -> None:
    for handle in range(1, 40):
        frontend.add(make_request([handle, 2, 3], handle=handle, max_tokens=handle))
    frontend.read_all_finished(*range(1, 40))
    for handle in range(1, 40):
        assert frontend.tokens[handle] == greedy([handle, 2, 3], handle)
        assert frontend.finish[handle] is Finish.LENGTH


def test_a_step_takes_no_longer_than_its_worker(frontend: RawFrontend) -> None:
    """A loop that slept between steps, until some message woke it, would take seconds for these."""
    started = time.monotonic()
    frontend.add(make_request(3, handle=1, max_tokens=200))
    frontend.read_all_finished(1)
    assert time.monotonic() - started < 5.0  # 200 steps of 0.1 ms, with much slack for a busy machine


def test_welcome_tells_what_a_frontend_must_know(frontend: RawFrontend) -> None:
    welcome = frontend.welcome
    assert welcome is not None
    assert welcome.model.vocab_size == VOCAB_SIZE and welcome.model.max_model_len == MAX_MODEL_LEN
    assert (welcome.limits.block_size, welcome.limits.num_blocks) == (16, 4096)
    assert welcome.files == {}


def test_an_aborted_request_frees_its_blocks(frontend: RawFrontend) -> None:
    frontend.add(make_request(100, handle=1, max_tokens=30_000))
    frontend.read_until(lambda: len(frontend.tokens[1]) > 10)
    assert frontend.stats().num_running == 1
    frontend.abort(Abort(epoch=frontend.epoch, handles=np.array([1, 999], np.uint64)))
    stats = frontend.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    frontend.abort(Abort(epoch=frontend.epoch, handles=np.array([1], np.uint64)))  # safe to repeat


BAD_REQUESTS: dict[str, dict[str, Any]] = {
    "no tokens": {"token_ids": np.zeros(0, np.int32), "prompt_len": 0},
    "prompt_len of 0": {"prompt_len": 0},
    "prompt_len negative": {"prompt_len": -1},
    "prompt_len past the tokens": {"prompt_len": 6},
    "prompt_len huge": {"prompt_len": 2**63 - 1},
    "tokens negative": {"token_ids": np.array([1, -1, 2, 3, 4], np.int32)},
    "tokens past the vocabulary": {"token_ids": np.array([1, VOCAB_SIZE, 2, 3, 4], np.int32)},
    "tokens of floats": {"token_ids": np.ones(5, np.float32)},
    "tokens of int64": {"token_ids": np.ones(5, np.int64)},
    "tokens of two dimensions": {"token_ids": np.ones((5, 1), np.int32)},
    "tokens of no dimension": {"token_ids": np.array(5, np.int32)},
    "prompt too long": {"token_ids": np.ones(MAX_MODEL_LEN, np.int32), "prompt_len": MAX_MODEL_LEN},
    "no child": {"seeds": []},
    "too many children": {"seeds": [1] * 20_000},
    "seed negative": {"seeds": [-1]},
    "handle negative": {"handle": -5},
    "handle past 64 bits with its children": {"handle": 2**64 - 1, "seeds": [1, 2]},
    "priority huge": {"priority": 2**40},
    "salt long": {"cache_salt": "x" * 2000},
    "resumed with two children": {"prompt_len": 3, "seeds": [1, 2]},
    "resumed at its end": {"prompt_len": 1, "sampling": Sampling(max_tokens=4)},
    "adapter": {"adapter": "some"},
    "deadline": {"deadline_s": 1.0},
}

BAD_SAMPLING: dict[str, dict[str, Any]] = {
    "max_tokens of 0": {"max_tokens": 0},
    "max_tokens negative": {"max_tokens": -1},
    "max_tokens huge": {"max_tokens": 2**40},
    "min_tokens past max_tokens": {"min_tokens": 5},
    "min_tokens negative": {"min_tokens": -1},
    "temperature negative": {"temperature": -1.0},
    "temperature not a number": {"temperature": float("nan")},
    "temperature infinite": {"temperature": float("inf")},
    "top_p of 0": {"top_p": 0.0},
    "top_p not a number": {"top_p": float("nan")},
    "top_p past 1": {"top_p": 1.5},
    "min_p past 1": {"min_p": 2.0},
    "min_p not a number": {"min_p": float("nan")},
    "top_k negative": {"top_k": -1},
    "top_k huge": {"top_k": 2**31},
    "temperature past 2": {"temperature": 2.5},
    "repetition_penalty of 0": {"repetition_penalty": 0.0},
    "repetition_penalty tiny": {"repetition_penalty": 1e-30},
    "repetition_penalty huge": {"repetition_penalty": 1e30},
    "repetition_penalty not a number": {"repetition_penalty": float("nan")},
    "presence_penalty huge": {"presence_penalty": 1e30},
    "frequency_penalty past -2": {"frequency_penalty": -2.01},
    "presence_penalty not a number": {"presence_penalty": float("nan")},
    "frequency_penalty infinite": {"frequency_penalty": float("-inf")},
    "logprobs negative": {"logprobs": -1},
    "logprobs too many": {"logprobs": 1000},
    "prompt_logprobs too many": {"prompt_logprobs": 2**40},
    "eos past the vocabulary": {"eos_token_ids": [VOCAB_SIZE]},
    "stop ids negative": {"stop_token_ids": [-1]},
    "stop ids too many": {"stop_token_ids": [1] * 5000},
    "bias ids without values": {"logit_bias_ids": np.array([1], np.int32)},
    "bias of other lengths": {
        "logit_bias_ids": np.array([1], np.int32),
        "logit_bias_values": np.ones(2, np.float32),
    },
    "bias not a number": {
        "logit_bias_ids": np.array([1], np.int32),
        "logit_bias_values": np.array([np.nan], np.float32),
    },
    "bias huge": {
        "logit_bias_ids": np.array([1, 2], np.int32),
        "logit_bias_values": np.array([1.0, 1e30], np.float32),
    },
    "bias infinite": {
        "logit_bias_ids": np.array([1], np.int32),
        "logit_bias_values": np.array([-np.inf], np.float32),
    },
    "bias past the vocabulary": {
        "logit_bias_ids": np.array([VOCAB_SIZE], np.int32),
        "logit_bias_values": np.ones(1, np.float32),
    },
    "bias of no dimension": {
        "logit_bias_ids": np.array(1, np.int32),
        "logit_bias_values": np.array(1.0, np.float32),
    },
    "allowed none": {"allowed_token_ids": np.zeros(0, np.int32)},
    "allowed negative": {"allowed_token_ids": np.array([-1], np.int32)},
    "allowed of int64": {"allowed_token_ids": np.array([1])},
    "bad word empty": {"bad_words": [[]]},
    "bad word past the vocabulary": {"bad_words": [[VOCAB_SIZE]]},
}


def bad_requests() -> Iterator[tuple[str, AddRequest]]:
    good = make_request(5, handle=77, max_tokens=4)
    for name, change in BAD_REQUESTS.items():
        yield name, msgspec.structs.replace(good, **change)
    for name, change in BAD_SAMPLING.items():
        yield name, msgspec.structs.replace(good, sampling=msgspec.structs.replace(good.sampling, **change))


def test_bad_requests_are_refused_and_nobody_else_notices(frontend: RawFrontend, other: RawFrontend) -> None:
    other.add(make_request([3, 4], handle=1, max_tokens=1500))
    refused_before = frontend.stats().num_refused
    corpus = list(bad_requests())
    for name, message in corpus:
        frontend.failures.clear()
        frontend.add(message)
        frontend.read_until(lambda: bool(frontend.failures))
        failure = frontend.failures[message.handle]
        assert failure.code in ("invalid", "unsupported"), name
        assert ":" in failure.message, name  # names the field
    frontend.add(make_request([1, 2], handle=5, max_tokens=3))
    frontend.read_all_finished(5)
    other.read_all_finished(1)
    assert other.tokens[1] == greedy([3, 4], 1500)
    assert frontend.stats().num_refused == refused_before + len(corpus)


def test_a_handle_in_use_is_refused_and_its_owner_goes_on(frontend: RawFrontend) -> None:
    frontend.add(make_request(3, handle=2, max_tokens=300))
    frontend.add(make_request(3, handle=1, seeds=[1, 2]))  # its second child would be 2
    frontend.read_until(lambda: 1 in frontend.failures)
    frontend.read_all_finished(2)
    assert frontend.tokens[2] == greedy(3, 300)


def test_what_the_model_cannot_do_fails_that_request_alone(frontend: RawFrontend) -> None:
    frontend.add(make_request(3, handle=1, logprobs=1))
    frontend.add(make_request(3, handle=2, max_tokens=5))
    frontend.read_all_finished(1, 2)
    assert frontend.failures[1].code == "internal"
    assert frontend.tokens[2] == greedy(3, 5)


# ------------------------------------------------------------------------------------ the wire


def test_another_protocol_version_is_told_so(address: str) -> None:
    with RawFrontend(address) as end:
        end.hello(protocol_version=999)
        end.read_until(lambda: end.goodbye is not None)
        assert end.goodbye is not None and "999" in end.goodbye.reason
        assert end.welcome is None


def test_messages_of_another_epoch_are_dropped_and_counted(frontend: RawFrontend) -> None:
    before = frontend.stats().dropped_messages
    frontend.add(make_request(3, handle=1), epoch=frontend.epoch + 1)
    frontend.abort(Abort(epoch=0, handles=np.array([1], np.uint64)))
    frontend.end.send(Heartbeat(epoch=3))
    stats = frontend.stats()
    assert stats.dropped_messages == before + 3
    assert stats.num_running == stats.num_waiting == 0


def test_a_message_before_hello_is_answered_by_goodbye(address: str, other: RawFrontend) -> None:
    with RawFrontend(address) as end:
        end.end.send(msgspec.structs.replace(make_request(3), epoch=other.epoch))
        end.read_until(lambda: end.goodbye is not None)
    assert other.stats().num_running == 0


def test_bytes_that_are_no_message_end_that_connection_alone(address: str, other: RawFrontend) -> None:
    other.add(make_request([3, 4], handle=1, max_tokens=800))
    before = other.stats()
    for garbage in (b"", b"\xc1", b"garbage" * 100, b"\x93\xa5Abort\x01", b"\x91" * 5000):
        with RawFrontend(address) as end:
            end.attach()
            end.end._socket.send(garbage)
            end.read_until(lambda end=end: end.goodbye is not None)  # type: ignore[misc]
            assert end.goodbye is not None and "malformed" in end.goodbye.reason
    stats = other.stats()
    assert stats.dropped_messages == before.dropped_messages + 5
    assert stats.num_frontends == before.num_frontends
    other.read_all_finished(1)
    assert other.tokens[1] == greedy([3, 4], 800)


@pytest.mark.parametrize(
    "handles", [np.array(1, np.uint64), np.ones((2, 2), np.uint64), np.ones(1, np.float64)]
)
def test_an_abort_of_no_vector_of_handles_is_malformed(
    address: str, other: RawFrontend, handles: np.ndarray
) -> None:
    with RawFrontend(address) as end:
        end.attach()
        end.abort(Abort(epoch=end.epoch, handles=handles))
        end.read_until(lambda: end.goodbye is not None)
    assert other.stats().num_frontends == 1


@pytest.mark.parametrize("pid", [-1, 0, 2**31 - 1, 2**40, 2**63])
def test_a_hello_with_an_impossible_pid_harms_nobody(address: str, other: RawFrontend, pid: int) -> None:
    with RawFrontend(address) as end:
        end.hello(pid=pid)
        end.read_until(lambda: end.welcome is not None)
        assert other.stats().num_frontends == 2
        end.end.close()
        wait_for(lambda: other.stats().num_frontends == 1)  # its socket tells


# ------------------------------------------------------------------------------------ frontends that go


def start_frontend(address: str, max_tokens: int) -> subprocess.Popen[str]:
    """A frontend process that streams one request; returns once its first tokens came."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.core_proc.raw_frontend", address, "1", str(max_tokens)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_a_killed_frontends_requests_are_freed_and_others_stream_on(address: str, other: RawFrontend) -> None:
    other.add(make_request([9, 9], handle=1, max_tokens=20_000))
    other.read_until(lambda: len(other.tokens[1]) > 5)
    with start_frontend(address, 30_000) as victim:
        assert other.stats().num_running == 2
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        other.read_until(lambda: other.stats().num_running == 1)
        assert time.monotonic() - killed < 5 * 0.2
        assert victim.stdout is not None
        victim.stdout.close()
    assert other.stats().num_frontends == 1
    assert len(other.tokens[1]) < 20_000, "the stream ended too early for this test to show anything"
    other.read_until(lambda: len(other.tokens[1]) > 1000)
    assert other.tokens[1] == greedy([9, 9], len(other.tokens[1]))
    other.abort(Abort(epoch=other.epoch, handles=np.array([1], np.uint64)))
    assert other.stats().kv_cache_usage == 0.0
    assert other.call(CheckInvariants()).error is None


def test_a_frontend_that_closes_its_socket_without_a_word_is_noticed(
    address: str, other: RawFrontend
) -> None:
    with RawFrontend(address) as end:
        end.attach()
        end.add(make_request(5, handle=1, max_tokens=30_000))
        end.read_until(lambda: len(end.tokens[1]) > 3)
        end.end.close()
    other.read_until(lambda: other.stats().num_running == 0)  # this process lives on: the socket tells
    assert other.stats().num_frontends == 1


# ------------------------------------------------------------------------------------ calls


def test_calls_are_answered_in_order(frontend: RawFrontend) -> None:
    calls = [frontend.ask(body) for body in (GetStats(), CheckInvariants(), ResetPrefixCache(), GetStats())]
    frontend.read_until(lambda: calls[-1] in frontend.replies)
    assert list(frontend.replies) == calls
    assert all(frontend.replies[call].error is None for call in calls)


def test_reset_forgets_what_was_cached(frontend: RawFrontend) -> None:
    assert frontend.call(ResetPrefixCache()).value
    hits = []
    for handle in (1, 2, 3):
        before = frontend.stats().prefix_cache_hits
        frontend.add(make_request(40, handle=handle))
        frontend.read_all_finished(handle)
        hits.append(frontend.stats().prefix_cache_hits - before)
        if handle == 2:
            assert frontend.call(ResetPrefixCache()).value
    assert hits == [0, 32, 0]


def test_pause_abort_ends_what_runs_and_queues_what_comes(frontend: RawFrontend) -> None:
    frontend.add(make_request(4, handle=1, max_tokens=30_000))
    frontend.read_until(lambda: len(frontend.tokens[1]) > 5)
    assert frontend.call(PauseGeneration(mode=PauseMode.ABORT)).error is None
    assert frontend.finish[1] is Finish.ABORT
    frontend.add(make_request(4, handle=2, max_tokens=3))
    stats = frontend.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 1)
    assert frontend.call(ResumeGeneration()).error is None
    frontend.read_all_finished(2)
    assert frontend.tokens[2] == greedy(4, 3)


def test_pause_wait_lets_what_runs_finish(frontend: RawFrontend) -> None:
    frontend.add(make_request(4, handle=1, max_tokens=500))
    frontend.read_until(lambda: len(frontend.tokens[1]) > 5)
    pause = frontend.ask(PauseGeneration(mode=PauseMode.WAIT, clear_cache=False))
    frontend.add(make_request(4, handle=2, max_tokens=3))
    frontend.read_until(lambda: pause in frontend.replies)
    assert len(frontend.tokens[1]) == 500 and not frontend.tokens[2]
    frontend.call(ResumeGeneration())
    frontend.read_all_finished(2)


@pytest.mark.parametrize("clear_cache", [True, False])
def test_pause_keep_freezes_and_resume_goes_on(frontend: RawFrontend, clear_cache: bool) -> None:
    frontend.add(make_request(4, handle=1, max_tokens=800))
    frontend.read_until(lambda: len(frontend.tokens[1]) > 5)
    assert frontend.call(PauseGeneration(mode=PauseMode.KEEP, clear_cache=clear_cache)).error is None
    frozen = len(frontend.tokens[1])
    steps = frontend.stats().step
    time.sleep(0.1)
    assert frontend.stats().step == steps and len(frontend.tokens[1]) == frozen < 800
    assert frontend.call(ResumeGeneration()).error is None
    frontend.read_all_finished(1)
    assert frontend.tokens[1] == greedy(4, 800)


def test_a_pause_is_answered_as_soon_as_it_has_come_to_rest(frontend: RawFrontend) -> None:
    """Not at the next heartbeat, a second later."""
    for _ in range(3):
        frontend.add(make_request(4, handle=1, max_tokens=30_000))
        frontend.read_until(lambda: len(frontend.tokens[1]) > 5)
        started = time.monotonic()
        frontend.call(PauseGeneration(mode=PauseMode.ABORT))
        assert time.monotonic() - started < 0.5
        frontend.call(ResumeGeneration())
        frontend.tokens.clear()
        frontend.finish.clear()


def test_resuming_answers_a_pause_that_has_not_come_to_rest(frontend: RawFrontend) -> None:
    frontend.add(make_request(4, handle=1, max_tokens=1000))
    frontend.read_until(lambda: len(frontend.tokens[1]) > 5)
    pause = frontend.ask(PauseGeneration(mode=PauseMode.WAIT))
    frontend.call(ResumeGeneration())
    assert "resumed" in (frontend.replies[pause].error or "")
    frontend.read_all_finished(1)


def test_the_queue_is_bounded() -> None:
    small = config(max_num_seqs=1, max_num_queued_reqs=3, simulation=SimulationConfig(step_us=2000.0))
    with running(small) as found, RawFrontend(found) as end:
        end.attach()
        end.add(make_request(4, handle=1, max_tokens=200))
        end.read_until(lambda: len(end.tokens[1]) > 0)
        for handle in range(2, 8):
            end.add(make_request(4, handle=handle, max_tokens=2))
        end.read_all_finished(1, 2, 3, 4)
        assert {handle: failure.code for handle, failure in end.failures.items()} == dict.fromkeys(
            (5, 6, 7), "queue_full"
        )
