"""A child process: its configuration, its reports, its end, and that it ends with its parent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tercet.ipc.child import Failed, Progress, Ready, Report
from tercet.ipc.process import Child, ProcessSpec
from tests.ipc.helpers.processes import ROOT, is_running, wait_gone

MODULE = "tests.ipc.helpers.child_program"
PROMISE_S = 2.0  # a child ends within this of its parent …
SLACK = 5  # … on a machine that is not five times slower


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.kill()
        assert child.wait(10.0)
        child.close()


def start(children: list[Child], words: str, **env: str) -> Child:
    child = Child(ProcessSpec("child", MODULE, words.encode(), tuple(env.items())))
    children.append(child)
    return child


def reports_until(child: Child, last: type[Report] | None, timeout_s: float = 20.0) -> list[Report]:
    """All reports up to one of this type, or up to the end of the process where that is None."""
    found: list[Report] = []
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended = child.poll() is not None
        found += child.reports()
        if (last is None and ended) or (last is not None and any(isinstance(r, last) for r in found)):
            return found
        select.select([child.report_fd, child.pidfd], [], [], 0.05)
    raise AssertionError(f"only {found} came")


def test_a_child_reports_progress_and_readiness_in_order(children: list[Child]) -> None:
    found = reports_until(start(children, "progress ready stuck"), Ready)
    assert found == [*(Progress("loading", i, 100) for i in range(100)), Ready()]


def test_configuration_of_any_size_and_environment_arrive(children: list[Child]) -> None:
    words = "echo-config" + " " * 5_000_000
    child = start(children, words, GREETING="hello")
    assert reports_until(child, None) == [Failed(f"{len(words)} hello")]
    assert "GREETING" not in os.environ


def test_a_child_that_cannot_start_says_why(children: list[Child]) -> None:
    child = start(children, "fail exit-3")
    assert reports_until(child, None) == [Failed("no model at that path")]
    assert child.poll() == 3
    assert child.describe_exit() == "exited with code 3"


def test_a_killed_child_is_described_by_its_signal(children: list[Child]) -> None:
    child = start(children, "ready stuck")
    reports_until(child, Ready)
    child.kill()
    assert child.wait(10.0)
    assert child.describe_exit() == "was killed by SIGKILL"
    assert select.select([child.pidfd], [], [], 0)[0] == [child.pidfd]


def test_garbage_on_the_report_pipe_is_skipped(children: list[Child]) -> None:
    assert reports_until(start(children, "garbage ready stuck"), Ready) == [Ready()]


def test_terminate_asks_and_kill_ends(children: list[Child]) -> None:
    child = start(children, "stubborn ready stuck")
    reports_until(child, Ready)
    child.terminate()
    assert not child.wait(0.3)
    child.kill()
    assert child.wait(10.0)
    child.terminate()  # harmless, once it is gone
    child.kill()


@pytest.mark.parametrize("death_signal", [signal.SIGKILL, signal.SIGTERM])
def test_letting_go_of_a_child_ends_it(children: list[Child], death_signal: signal.Signals) -> None:
    """The end-of-file alone: this process, its parent, lives on."""
    child = start(children, "ready stuck", DEATH_SIGNAL=str(int(death_signal)))
    reports_until(child, Ready)
    pid = child.pid
    child.close()
    assert child.wait(PROMISE_S * SLACK)
    assert not is_running(pid)


def test_a_child_that_ignores_sigterm_still_ends_with_its_parent(children: list[Child]) -> None:
    child = start(children, "stubborn ready stuck", DEATH_SIGNAL=str(int(signal.SIGTERM)))
    reports_until(child, Ready)
    child.close()
    assert child.wait(PROMISE_S * SLACK)


@pytest.mark.parametrize("fault", [False, True])
def test_a_child_that_is_asked_to_leave_learns_why(children: list[Child], fault: bool) -> None:
    child = start(children, "ready-why", DEATH_SIGNAL=str(int(signal.SIGTERM)))
    reports_until(child, Ready)
    child.terminate(fault=fault)
    assert reports_until(child, Failed) == [Failed(f"orphaned=False fault={fault}")]


def test_an_orphan_knows_that_it_is_one(children: list[Child]) -> None:
    child = start(children, "ready-why", DEATH_SIGNAL=str(int(signal.SIGTERM)))
    reports_until(child, Ready)
    os.close(child._life_w)
    child._life_w = os.open(os.devnull, os.O_WRONLY)
    assert reports_until(child, Failed) == [Failed("orphaned=True fault=True")]


def test_children_survive_ctrl_c_in_the_terminal(children: list[Child]) -> None:
    """It is their parent's to handle: they are in a group of their own, and ignore the signal besides."""
    child = start(children, "ready stuck")
    reports_until(child, Ready)
    assert os.getpgid(child.pid) != os.getpgid(0)
    os.kill(child.pid, signal.SIGINT)
    assert not child.wait(0.3)


def test_a_child_finds_the_same_package_from_another_folder(
    children: list[Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert reports_until(start(children, "ready stuck"), Ready) == [Ready()]


def test_no_descriptor_is_left(children: list[Child]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        child = start(children, "ready")
        assert child.wait(20.0)
        child.close()
        child.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_inherits_nothing_but_its_own_pipes(children: list[Child]) -> None:
    """Were the life pipe of one child open in another, neither would see its parent's end."""
    first = start(children, "ready stuck")
    second = start(children, "ready stuck")
    for child in (first, second):
        reports_until(child, Ready)
    for child in (first, second):
        links = [os.readlink(f"/proc/{child.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{child.pid}/fd")]
        assert (
            sum(link.startswith("pipe:") for link in links) <= 2 + 2
        )  # stdout and stderr may be pipes of ours
    pid = first.pid
    first.close()
    wait_gone([pid], PROMISE_S * SLACK)
    assert is_running(second.pid)


def test_a_program_started_by_hand_says_what_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", MODULE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "tercet --help" in done.stderr
