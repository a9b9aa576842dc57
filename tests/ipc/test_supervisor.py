"""The supervisor: all ready or none left, death told at once, an ordered stop, and nothing that outlives it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tercet.ipc.child import Progress
from tercet.ipc.errors import CannotStartError
from tercet.ipc.process import ProcessSpec
from tercet.ipc.supervisor import Supervisor
from tests.ipc.helpers.processes import read_line, start_program, wait_gone, wait_until

MODULE = "tests.ipc.helpers.child_program"
PARENT = "tests.ipc.helpers.parent_program"
PROMISE_S, SLACK = 2.0, 5


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervisor]]:
    made: list[Supervisor] = []

    def make(*words: str, env: tuple[tuple[str, str], ...] = (), **options: Any) -> Supervisor:
        specs = [
            ProcessSpec(f"child {i}", MODULE, word.encode(), (*env, ("NAME", f"child {i}")))
            for i, word in enumerate(words)
        ]
        made.append(Supervisor(specs, **options))
        return made[-1]

    before = _threads_and_descriptors()
    yield make
    for supervisor in made:
        supervisor.stop()
    wait_gone([pid for supervisor in made for pid in supervisor.pids.values()], 1.0)
    assert _threads_and_descriptors() == before


def _threads_and_descriptors() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_start_waits_until_all_are_ready(supervise: Callable[..., Supervisor]) -> None:
    seen: list[tuple[str, Progress]] = []
    supervisor = supervise("slowly ready stuck", "ready stuck", on_progress=lambda *item: seen.append(item))
    supervisor.start()
    assert [progress.done for name, progress in seen if name == "child 0"] == [0, 1, 2, 3]
    assert set(supervisor.pids) == {"child 0", "child 1"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("fail stuck", "no model at that path"),
        ("fail exit-3", "no model at that path"),
        ("exit-3", "exited with code 3 while starting"),
        ("progress abort", "was killed by SIGABRT while starting"),
    ],
)
def test_one_that_cannot_start_is_named_and_none_is_left(
    supervise: Callable[..., Supervisor], words: str, problem: str
) -> None:
    deaths: list[str] = []
    supervisor = supervise("stuck", words, "ready stuck", on_death=deaths.append)
    with pytest.raises(CannotStartError, match=problem) as error:
        supervisor.start()
    assert error.value.name == "child 1"
    wait_gone(supervisor.pids.values(), 0.5)
    assert deaths == []  # that is for those who were ready


def test_silence_is_a_failed_start(supervise: Callable[..., Supervisor]) -> None:
    with pytest.raises(CannotStartError, match="no sign of life for 1 s"):
        supervise("stuck", ready_timeout_s=1.0).start()


def test_progress_puts_off_the_deadline(supervise: Callable[..., Supervisor]) -> None:
    supervise("slowly slowly slowly ready stuck", ready_timeout_s=1.5).start()  # 2.4 s in all


@pytest.mark.parametrize("victim", ["child 0", "child 1"])
def test_a_death_is_told_at_once_and_the_others_are_stopped(
    supervise: Callable[..., Supervisor], victim: str
) -> None:
    told = threading.Event()
    deaths: list[str] = []

    def on_death(problem: str) -> None:
        deaths.append(problem)
        told.set()

    supervisor = supervise("ready stuck", "ready stuck", on_death=on_death)
    supervisor.start()
    pids = supervisor.pids
    killed = time.monotonic()
    os.kill(pids[victim], signal.SIGKILL)
    assert told.wait(5.0)
    assert time.monotonic() - killed < 1.0 * SLACK
    assert deaths == [f"{victim} (pid {pids[victim]}) was killed by SIGKILL"]
    wait_gone(pids.values(), PROMISE_S * SLACK)


def test_last_words_are_part_of_the_news(supervise: Callable[..., Supervisor]) -> None:
    """Whether they are read together with the end of the process or long before."""
    for words in ("ready last-words exit-3", "ready last-words nap nap exit-3"):
        deaths: list[str] = []
        supervisor = supervise(words, "ready stuck", on_death=deaths.append)
        try:
            supervisor.start()
        except CannotStartError as error:  # quick enough to die before the other was ready
            deaths.append(str(error))
        wait_until(lambda deaths=deaths: bool(deaths), 10.0, "no news")  # type: ignore[misc]
        assert "the device fell off the bus" in deaths[0]


def test_stop_tells_the_first_child_first(supervise: Callable[..., Supervisor], tmp_path: Path) -> None:
    left = tmp_path / "left"
    words = "say-when-left ready stuck"
    supervisor = supervise(words, words, words, env=(("LEFT", str(left)),))
    supervisor.start()
    supervisor.stop()
    assert left.read_text().splitlines()[0] == "child 0"
    assert len(left.read_text().splitlines()) == 3


def test_stop_ends_those_who_do_not_listen(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("stubborn ready stuck", "stubborn ready stuck")
    supervisor.start()
    started = time.monotonic()
    supervisor.stop(timeout_s=0.5)
    assert 0.5 <= time.monotonic() - started < 0.5 + 5.0
    wait_gone(supervisor.pids.values(), 0.1)


def test_stop_is_idempotent_and_may_come_from_any_thread(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("ready stuck")
    supervisor.start()
    threads = [threading.Thread(target=supervisor.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
    supervisor.stop()


def test_stop_during_the_start_ends_it(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("stuck")
    timer = threading.Timer(0.3, supervisor.stop)
    timer.start()
    with pytest.raises(CannotStartError, match="stopped while starting"):
        supervisor.start()
    timer.join()


def test_stop_before_the_start_starts_nothing(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("stuck")
    supervisor.stop()
    with pytest.raises(CannotStartError, match="stopped while starting"):
        supervisor.start()
    assert not supervisor.pids


def test_stop_from_on_death_does_not_deadlock(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise("ready nap exit-3", "ready stuck")
    done = threading.Event()

    def on_death(problem: str) -> None:
        supervisor.stop()
        done.set()

    supervisor.on_death = on_death
    supervisor.start()
    assert done.wait(10.0)


def test_a_callback_that_raises_is_a_failed_start_not_a_silent_one(
    supervise: Callable[..., Supervisor],
) -> None:
    def broken(name: str, progress: Progress) -> None:
        raise RuntimeError("a bug in a progress bar")

    with pytest.raises(CannotStartError, match="a bug in a progress bar"):
        supervise("progress ready stuck", on_progress=broken).start()


def test_a_program_that_does_not_exist_is_a_failed_start() -> None:
    supervisor = Supervisor([ProcessSpec("child", "tests.no_such_module", b"")])
    with pytest.raises(CannotStartError, match="exited with code 1"):
        supervisor.start()


# ------------------------------------------------------------------------------------ the parent's end


@pytest.mark.parametrize("phase", ["import", "load", "ready"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_children_do_not_outlive_their_parent(phase: str, how: signal.Signals) -> None:
    words = {"import": "stuck", "load": "slowly slowly slowly slowly stuck", "ready": "ready stuck"}[phase]
    second = f"stubborn {words}" if how is signal.SIGKILL else words
    with start_program(PARENT, words, second) as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        if phase == "load":
            time.sleep(0.5)
        if phase == "ready":
            read_line(parent, "ready")
        parent.send_signal(how)
        wait_gone([*pids, parent.pid], PROMISE_S * SLACK)


def test_ctrl_c_while_starting_leaves_in_order() -> None:
    with start_program(PARENT, "slowly slowly slowly ready stuck") as parent:
        read_line(parent, "pids")
        time.sleep(0.3)
        parent.send_signal(signal.SIGINT)
        read_line(parent, "left")
        assert parent.wait(10.0) == 0


def test_a_parent_is_told_of_a_death_and_leaves() -> None:
    with start_program(PARENT, "ready stuck", "ready stuck") as parent:
        pids = [int(pid) for pid in read_line(parent, "pids").split()]
        read_line(parent, "ready")
        os.kill(pids[1], signal.SIGKILL)
        assert "child 1" in read_line(parent, "dead")
        read_line(parent, "left")
        wait_gone(pids, PROMISE_S * SLACK)
