"""However an engine ends, nothing of it is left: no process, no socket file, no directory.

The core and the worker are the real programs (the worker with a simulated model); their parent is a small program
that the tests end in every way and at every phase.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tercet.errors import StartupError
from tercet.ipc.address import is_serving, is_socket
from tests.core_proc.harness import make_request
from tests.core_proc.raw_frontend import RawFrontend
from tests.e2e.engine_program import make_processes
from tests.ipc.helpers.processes import read_line, start_program, wait_gone, wait_until

PROGRAM = "tests.e2e.engine_program"
GONE_S = 2.0 * 5  # the promise, with slack for a busy machine
TOLD_S = 1.0 * 5


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the engines of a test have their files; empty in the end. Short, since socket paths must be."""
    path = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
    yield path
    left = [str(found.relative_to(path)) for found in path.rglob("*")]
    shutil.rmtree(path)
    assert left == []


def shared_memory() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if "tercet" in name}


@pytest.mark.parametrize("phase", ["import", "start", "ready", "busy"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_outlives_the_parent(folder: Path, phase: str, how: signal.Signals) -> None:
    with start_program(PROGRAM, TMPDIR=str(folder)) as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        if phase == "start":
            time.sleep(0.15)  # numpy and zmq are being imported, or sockets opened
        if phase in ("ready", "busy"):
            read_line(parent, phase)
        parent.send_signal(how)
        wait_gone([*pids, parent.pid], GONE_S)
    wait_until(lambda: not any(folder.iterdir()), GONE_S, f"left: {list(folder.rglob('*'))}")
    assert shared_memory() == set()


@pytest.mark.parametrize("delay_ms", [0, 20, 50, 80, 120, 180, 250, 350])
def test_nothing_outlives_a_parent_killed_at_any_moment_of_the_start(folder: Path, delay_ms: int) -> None:
    with start_program(PROGRAM, TMPDIR=str(folder)) as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        time.sleep(delay_ms / 1000)
        parent.kill()
        wait_gone(pids, GONE_S)
    wait_until(lambda: not any(folder.iterdir()), GONE_S, f"left: {list(folder.rglob('*'))}")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_the_socket_at_an_address_of_the_users_choice_goes_too(folder: Path, how: signal.Signals) -> None:
    address = f"ipc://{folder}/engine"
    with start_program(PROGRAM, address, TMPDIR=str(folder)) as parent:
        read_line(parent, "busy")
        assert is_serving(address)
        parent.send_signal(how)
        wait_until(lambda: not is_socket(address), GONE_S, "the socket file is left")
        parent.wait()
    wait_until(lambda: not any(folder.iterdir()), GONE_S, f"left: {list(folder.rglob('*'))}")


@pytest.mark.parametrize(("victim", "name"), [(0, "core"), (1, "worker 0")])
def test_when_a_process_dies_the_parent_is_told_and_the_other_leaves(
    folder: Path, victim: int, name: str
) -> None:
    with start_program(PROGRAM, TMPDIR=str(folder)) as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        read_line(parent, "busy")
        os.kill(pids[victim], signal.SIGKILL)
        killed = time.monotonic()
        problem = read_line(parent, "dead")
        assert time.monotonic() - killed < TOLD_S
        assert problem.startswith(f"{name} (pid {pids[victim]}) was killed by SIGKILL")
        wait_gone(pids, GONE_S)
        read_line(parent, "left")
        assert parent.wait(GONE_S) == 0


def test_frontends_are_told_when_the_worker_dies(folder: Path) -> None:
    with start_program(PROGRAM, TMPDIR=str(folder)) as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        with RawFrontend(read_line(parent, "ready")) as other:
            other.attach()
            other.add(make_request(4, max_tokens=90_000))
            other.read_until(lambda: len(other.tokens[1]) > 10)
            os.kill(pids[1], signal.SIGKILL)
            other.read_until(lambda: other.goodbye is not None, TOLD_S)
            assert other.goodbye is not None and "died" in other.goodbye.reason
            assert not other.finish[1], "a request that was cut off must not look finished"
        read_line(parent, "left")


def test_all_processes_killed_at_once_are_swept_by_the_next_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start_program(PROGRAM, TMPDIR=str(folder)) as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        read_line(parent, "busy")
        os.kill(pids[0], signal.SIGSTOP)  # so that the core, which would clean up, cannot
        parent.kill()
        os.kill(pids[0], signal.SIGKILL)
        wait_gone(pids, GONE_S)
    assert any(folder.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    processes = make_processes()
    assert [path.name for path in folder.iterdir()] == [Path(processes.address).parent.name]
    processes.stop()


def test_an_address_that_is_in_use_is_refused_and_its_engine_goes_on(folder: Path) -> None:
    address = f"ipc://{folder}/engine"
    with start_program(PROGRAM, address, TMPDIR=str(folder)) as parent:
        read_line(parent, "ready")
        with pytest.raises(StartupError, match="in use"):
            make_processes(address)
        with RawFrontend(address) as frontend:
            frontend.attach()
        parent.send_signal(signal.SIGINT)
        read_line(parent, "left")


def test_of_several_engines_started_at_once_for_one_address_one_wins(folder: Path) -> None:
    address = f"ipc://{folder}/engine"
    rivals = [start_program(PROGRAM, address, TMPDIR=str(folder)) for _ in range(3)]
    words = [end_of_start(rival) for rival in rivals]
    (winner,) = (rival for rival, word in zip(rivals, words, strict=True) if word.startswith("ready"))
    losers = [word for word in words if not word.startswith("ready")]
    assert all("in use: another engine serves there" in word for word in losers), losers
    for rival in rivals:
        if rival is not winner:
            assert rival.wait(GONE_S) == 1
    with RawFrontend(address) as frontend:
        frontend.attach()
        frontend.add(make_request(4, max_tokens=5))
        frontend.read_all_finished(1)
    winner.send_signal(signal.SIGINT)
    read_line(winner, "left")
    assert winner.wait(GONE_S) == 0
    for rival in rivals:
        assert rival.stdout is not None
        rival.stdout.close()


def end_of_start(rival: subprocess.Popen[str]) -> str:
    """`ready …`, or `cannot start …`."""
    assert rival.stdout is not None
    return next(line for line in rival.stdout if line.startswith(("ready", "cannot start")))


def test_stop_is_prompt_at_every_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after a frontend has left the core goes to sleep; a signal that comes just then must wake it."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for _ in range(10):
        processes = make_processes()
        processes.start()
        with RawFrontend(processes.address) as frontend:
            frontend.attach()
            frontend.add(make_request(4, max_tokens=2))
            frontend.read_all_finished(1)
        started = time.monotonic()
        processes.stop(timeout_s=30.0)
        assert time.monotonic() - started < 0.5 * 5


def test_two_engines_in_one_process_do_not_disturb_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    first, second = make_processes(), make_processes()
    first.start()
    second.start()
    with RawFrontend(second.address) as frontend:
        frontend.attach()
        frontend.add(make_request(4, max_tokens=300))
        first.stop()
        frontend.read_all_finished(1)
    second.stop()
