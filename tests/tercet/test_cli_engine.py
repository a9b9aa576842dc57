"""The commands with an engine: a simulated one, whose answers can be told beforehand."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import tercet
from tercet import AsyncLLM, EngineArgs, SamplingParams, StartupError, TokensPrompt, __main__
from tercet.cli.engine import _Signals, _Stopped
from tercet.frontend.launcher import EngineProcesses
from tercet.frontend.tokenizer import Tokenizer, load_bundle
from tercet.worker_proc.simulated_runner import expected_tokens
from tests.tercet import cli_tools
from tests.tercet.cli_tools import (
    DEADLINE_S,
    TERCET,
    VOCAB_SIZE,
    Terminal,
    descendants,
    environment,
    simulated_flags,
    stop,
    wait_gone,
)

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_tools.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(load_bundle(folder))


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A running engine that takes 5 ms a step."""
    with cli_tools.engine(*simulated_flags(folder, step_us=5000)) as (_, address):
        yield address


def expected_text(tokenizer: Tokenizer, prompt: str, max_tokens: int) -> str:
    """What the simulated model says to a text."""
    tokens = expected_tokens(tokenizer.encode(prompt), max_tokens, VOCAB_SIZE)
    return tokenizer.decode(tokens[: tokens.index(0)] if 0 in tokens else tokens)


def chat_prompt(*messages: tuple[str, str]) -> str:
    return "".join(f"<{role}>{content}\n" for role, content in messages) + "<assistant>"


# chat and complete


def test_complete_prints_the_continuation_and_figures(folder: Path, tokenizer: Tokenizer) -> None:
    done = cli_tools.run("complete", "some words", "--max-tokens", "20", *simulated_flags(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_text(tokenizer, "some words", 20) + "\n"
    assert "TTFT" in done.stderr
    assert done.stderr.count("\n") == 1  # and no log


def test_complete_reads_stdin_and_attaches(address: str, tokenizer: Tokenizer) -> None:
    done = cli_tools.run("complete", "--max-tokens", "8", "--connect", address, stdin="words\nthat are\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected_text(tokenizer, "words\nthat are", 8) + "\n"


@pytest.mark.parametrize("piped", [True, False])
def test_one_answer(piped: bool, address: str, tokenizer: Tokenizer) -> None:
    flags = ["--system", "be kind", "--max-tokens", "12", "--connect", address]
    given = [] if piped else ["--prompt", "hello"]
    done = cli_tools.run("chat", *given, *flags, stdin="hello\n" if piped else "")
    assert done.returncode == 0, done.stderr
    prompt = chat_prompt(("system", "be kind"), ("user", "hello"))
    assert done.stdout == expected_text(tokenizer, prompt, 12) + "\n"


def test_too_long_a_prompt_is_one_line(address: str) -> None:
    done = cli_tools.run("complete", "--connect", address, stdin="word " * 5000)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tercet: error: prompt: has ")
    assert done.stderr.count("\n") == 1


def test_stream_comes_as_it_is_generated(address: str) -> None:
    command = [*TERCET, "complete", "words", "--max-tokens", "600", "--ignore-eos", "--connect", address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) != b""
        assert process.poll() is None  # 600 steps of 5 ms are not over with the first byte
        process.stdout.close()  # as `head` does
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(DEADLINE_S) == 1


def test_interrupted_answer_is_aborted(address: str) -> None:
    command = [*TERCET, "complete", "words", "--max-tokens", "900", "--ignore-eos", "--connect", address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert stderr == b""
    assert asyncio.run(_num_running(address)) == 0


async def _num_running(address: str) -> float:
    async with AsyncLLM.connect(address) as engine:
        metrics = {metric.name: metric for metric in await engine.get_metrics()}
    return float(metrics["tercet:num_requests_running"].value)  # type: ignore[attr-defined]


def test_sigterm_stops_the_engine_of_a_chat(folder: Path) -> None:
    flags = ["--max-tokens", "900", "--ignore-eos", *simulated_flags(folder, step_us=20_000)]
    with subprocess.Popen(
        [*TERCET, "complete", "words", *flags], stdout=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        family = descendants(process.pid)
        assert len(family) == 2
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 143
    wait_gone(family)


# A conversation on a terminal


def test_conversation(address: str, tokenizer: Tokenizer) -> None:
    terminal = Terminal("chat", "--connect", address, "--max-tokens", "10")
    terminal.expect("Ctrl-D leaves")
    terminal.expect("> ")
    terminal.send("/help\n")
    terminal.expect("/reset +forget")
    terminal.send("hello\n")
    first = terminal.expect(r"(\d+) prompt tokens.*, (\d+) generated, TTFT")
    terminal.send("more\n")
    second = terminal.expect(r"(\d+) prompt tokens.*, (\d+) generated, TTFT")
    terminal.send("/reset\n")
    terminal.send("hello\n")
    third = terminal.expect(r"(\d+) prompt tokens.*, (\d+) generated, TTFT")
    # The prompt holds the whole conversation, and after /reset none of it.
    answer = expected_text(tokenizer, chat_prompt(("user", "hello")), 10)
    turns = (("user", "hello"), ("assistant", answer), ("user", "more"))
    assert int(first[1]) == len(tokenizer.encode(chat_prompt(("user", "hello"))))
    assert int(second[1]) == len(tokenizer.encode(chat_prompt(*turns)))
    assert third[1] == first[1]
    terminal.send("/nonsense\n")
    terminal.expect("/nonsense is no command")
    terminal.send("\x04")
    assert terminal.end() == 0


def test_ctrl_c_interrupts_the_answer_and_not_the_chat(address: str) -> None:
    terminal = Terminal("chat", "--connect", address, "--max-tokens", "900", "--ignore-eos")
    terminal.expect("> ")
    terminal.send("hello\n")
    terminal.expect(r"hello\r\n[^\r]")  # the echo, and then a first piece of the answer
    terminal.send("\x03")
    terminal.expect("interrupted")
    terminal.expect("> ")
    terminal.send("half a line\x03")
    terminal.expect("> ")
    terminal.send("/quit\n")
    assert terminal.end() == 0


def test_failed_turn_leaves_the_conversation_as_it_was(address: str) -> None:
    terminal = Terminal("chat", "--connect", address, "--max-tokens", "5")
    terminal.expect("> ")
    terminal.send("ü!" * 1000 + "\n")
    terminal.expect("prompt: has .*/reset starts over")
    terminal.send("hello\n")
    terminal.expect("generated, TTFT")
    terminal.send("/quit\n")
    assert terminal.end() == 0


def test_terminal_shows_the_start(folder: Path) -> None:
    terminal = Terminal("complete", "words", "--max-tokens", "3", *simulated_flags(folder))
    terminal.expect("starting the engine")
    terminal.expect("generated, TTFT")
    assert terminal.end() == 0


# engine


def test_engine_serves_at_its_address_and_ends_with_a_signal(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "socket"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        with cli_tools.engine("--address", f"ipc://{path}", *simulated_flags(folder)) as (process, address):
            assert address == f"ipc://{path}"
            assert stat.S_ISSOCK(path.stat().st_mode)
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert asyncio.run(_generate(address)) == expected_tokens([5, 6, 7], 4, VOCAB_SIZE)
            family = descendants(process.pid)
            code, stderr = stop(process, number)
            assert (code, stderr) == (0, "tercet: stopping; a second signal stops at once\n")
            wait_gone(family)
            assert not path.parent.exists()


async def _generate(address: str) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    async with AsyncLLM.connect(address) as engine:
        outputs = [out async for out in engine.generate(TokensPrompt(prompt_token_ids=[5, 6, 7]), params)]
    return outputs[-1].outputs[0].token_ids


def test_private_directory_of_an_engine_is_gone_after_it(folder: Path) -> None:
    with cli_tools.engine(*simulated_flags(folder)) as (process, address):
        directory = Path(address.removeprefix("ipc://")).parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stop(process, signal.SIGTERM)[0] == 0
        assert not directory.exists()


def test_signal_while_starting_ends_in_order(folder: Path) -> None:
    process = subprocess.Popen(
        [*TERCET, "engine", *simulated_flags(folder)], stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + DEADLINE_S
    while not (family := descendants(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    family += [child for child in descendants(process.pid) if child not in family]
    code, stderr = stop(process, signal.SIGTERM)
    assert code == 0, stderr
    assert "Traceback" not in stderr
    wait_gone(family)


def test_signal_before_the_start_keeps_it_from_beginning() -> None:
    with _Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.events.get(timeout=DEADLINE_S) is None
        with pytest.raises(_Stopped), signals.raised():
            pytest.fail("the start has begun")


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_interrupt_at_any_moment_of_the_start_is_silent(delay_s: float, folder: Path) -> None:
    process = subprocess.Popen(
        [*TERCET, "engine", *simulated_flags(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + DEADLINE_S
    while "msgspec" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < deadline:
        pass  # Python itself is starting
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=DEADLINE_S)
    assert process.returncode in (0, 130), stderr
    assert "Traceback" not in stderr


def test_interrupt_of_the_imports_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str, *_: object) -> None:
        if name == "tercet.cli":
            raise KeyboardInterrupt

    finder = SimpleNamespace(find_spec=interrupt)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    monkeypatch.delitem(sys.modules, "tercet.cli")
    monkeypatch.delattr(tercet, "cli")
    assert __main__.main() == 130


def test_ignored_hangup_stays_ignored(folder: Path) -> None:
    command = f"trap '' HUP; exec {shlex.join([*TERCET, 'engine', *simulated_flags(folder)])}"
    with subprocess.Popen(
        ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ipc://")
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        assert stop(process, signal.SIGTERM)[0] == 0


def test_stopped_processes_do_not_start(folder: Path) -> None:
    processes = EngineProcesses(EngineArgs(device="simulated").create_engine_config())
    processes.stop()
    with pytest.raises(StartupError, match="stopped while starting"):
        processes.start()
    assert not processes.pids


def test_full_disk_is_one_line(address: str) -> None:
    with open("/dev/full", "w") as full:
        command = [*TERCET, "complete", "words", "--max-tokens", "4", "--connect", address]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=DEADLINE_S
        )
    assert done.returncode == 1
    assert done.stderr.startswith("tercet: error: ") and "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_too_small_a_cache_is_an_error_of_the_arguments(folder: Path) -> None:
    simulation = ["--device", "simulated", "--max-model-len", "8192", "--simulation", '{"num_blocks": 10}']
    done = cli_tools.run("engine", *simulation)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tercet: error: core: the KV cache holds ")
    assert done.stderr.count("\n") == 1


def test_second_signal_is_immediate(folder: Path) -> None:
    with cli_tools.engine(*simulated_flags(folder)) as (process, _):
        family = descendants(process.pid)
        for child in family:
            child.suspend()  # so that the orderly way takes its full time
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        for child in family:
            try:
                child.resume()
            except psutil.NoSuchProcess:
                pass
        wait_gone(family)


@pytest.mark.parametrize("victim", ["core", "worker"])
def test_death_of_a_process_ends_the_engine_with_its_reason(
    victim: str, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with cli_tools.engine("--address", f"ipc://{path}", *simulated_flags(folder)) as (process, _):
        family = descendants(process.pid)
        next(child for child in family if f"{victim}_proc" in " ".join(child.cmdline())).kill()
        _, stderr = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 1
        last = stderr.splitlines()[-1]
        assert last.startswith(f"tercet: error: the engine has died: {victim}")
        assert "SIGKILL" in last
        assert "Traceback" not in stderr
        wait_gone(family)
        assert not path.exists()


def test_sigkill_of_the_engine_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with cli_tools.engine("--address", f"ipc://{path}", *simulated_flags(folder)) as (process, _):
        family = descendants(process.pid)
        assert len(family) == 2
        os.kill(process.pid, signal.SIGKILL)
        wait_gone(family)
        assert not path.exists()


def test_address_in_use_is_refused(address: str, folder: Path) -> None:
    done = cli_tools.run("engine", "--address", address, *simulated_flags(folder))
    assert done.returncode == 1
    assert done.stderr == f"tercet: error: {address} is in use: another engine serves there\n"
    assert asyncio.run(_generate(address)) == expected_tokens([5, 6, 7], 4, VOCAB_SIZE)  # it lives
