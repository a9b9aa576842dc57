"""What tests of processes share: seeing whether one is gone, and starting programs of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (its reaper may be slow, and is none of our business)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait; returns how long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, what
        time.sleep(0.005)
    return time.monotonic() - started


def wait_gone(pids: Iterable[int], timeout_s: float) -> float:
    pids = list(pids)
    return wait_until(lambda: not any(map(is_running, pids)), timeout_s, f"still running, of {pids}")


def start_program(module: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """A program of the tests, with its output on a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        text=True,
    )


def read_line(process: subprocess.Popen[str], start: str) -> str:
    """The rest of the first line of output that begins so."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line.removeprefix(start).strip()
    raise AssertionError(f"the program ended without saying {start!r}")
