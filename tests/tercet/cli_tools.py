"""What the tests of the command line share: running it, a simulated engine with text, and a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
TERCET = [sys.executable, "-m", "tercet"]
DEADLINE_S = 60.0  # for what takes a second or two on an idle machine
VOCAB_SIZE = 320
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: ours, with this checkout on the path."""
    env = {key: value for key, value in os.environ.items() if key != "TERCET_LOGGING_LEVEL"}
    return {**env, "PYTHONPATH": str(ROOT), **extra}


def run(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*TERCET, *args],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(**env),
        timeout=2 * DEADLINE_S,
        cwd=ROOT,
    )


def write_tokenizer(folder: Path) -> Path:
    """A byte-level tokenizer of VOCAB_SIZE tokens with a chat template; token 0 ends a text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        f"{left} {right}" for left in ("some", "words", "that", "are") for right in ("met", "often", "here")
    ]
    backend.train_from_iterator(corpus * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def simulated_flags(tokenizer: Path, *, step_us: float = 0.0) -> list[str]:
    """Flags of an engine that starts in a second and answers with `expected_tokens`."""
    return [
        *("--device", "simulated", "--tokenizer", str(tokenizer), "--max-model-len", "1024"),
        *("--hf-overrides", json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": 0})),
        *("--simulation", json.dumps({"step_us": step_us})),
    ]


@contextmanager
def engine(*flags: str, stderr: int | None = subprocess.PIPE) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`tercet engine` with these flags, and its address; killed at the end if it is still there."""
    process = subprocess.Popen(
        [*TERCET, "engine", *flags],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment(TERCET_LOGGING_LEVEL="WARNING"),
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            _, words = process.communicate(timeout=DEADLINE_S)
            raise AssertionError(f"no engine: {words}")
        yield process, address
    finally:
        family = descendants(process.pid)
        if process.poll() is None:
            process.kill()
        process.communicate()
        wait_gone(family)


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below this one; none where it is gone."""
    try:
        found: list[psutil.Process] = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def wait_gone(processes: list[psutil.Process], timeout_s: float = 10.0) -> None:
    """Assert that the processes end: promised in 2 s, with 5 × slack."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    assert [process.cmdline() for process in alive] == []


def stop(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Send a signal and wait; the exit code and what was said on stderr."""
    process.send_signal(number)
    _, stderr = process.communicate(timeout=DEADLINE_S)
    return process.returncode, stderr


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *args: str) -> None:
        self._fd, follower = pty.openpty()
        self.process = subprocess.Popen(
            [*TERCET, *args],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment(TERM="xterm", COLUMNS="100"),
            cwd=ROOT,
            start_new_session=True,  # a controlling terminal of its own, for Ctrl-C
            preexec_fn=_take_terminal,
        )
        os.close(follower)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Read until the text not yet matched has this pattern; what is before it counts as seen."""
        deadline = time.monotonic() + DEADLINE_S
        while (match := re.search(pattern, self.seen)) is None:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come; seen: {self.seen!r}"
            try:
                self.seen += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # the command has ended
                raise AssertionError(f"{pattern!r} did not come; seen: {self.seen!r}") from None
        self.seen = self.seen[match.end() :]
        return match

    def end(self) -> int:
        """The exit code."""
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            os.close(self._fd)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
