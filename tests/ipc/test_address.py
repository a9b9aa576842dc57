"""Who may bind an address: one at a time, however many try at the same moment, and whatever a killed one left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tercet.errors import ConfigError
from tercet.ipc.address import AddressClaim, is_serving, is_socket, remove_dead_socket, socket_path
from tercet.ipc.channel import RouterEnd
from tercet.ipc.messages import FrontendToCore
from tests.conftest import FULL
from tests.ipc.helpers.processes import ROOT

NUM_ROUNDS = 200 if FULL else 25
NUM_RIVALS = 4

RIVAL = """
import sys, time
from tercet.errors import ConfigError
from tercet.ipc.channel import RouterEnd
from tercet.ipc.messages import FrontendToCore
folder, rounds = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
start = float(sys.stdin.readline())
held = []
for i in range(rounds):
    time.sleep(max(0.0, start + i * 0.02 - time.time()))
    try:
        held.append(RouterEnd(f"ipc://{folder}/{i}", FrontendToCore))
        print("won", i, flush=True)
    except ConfigError as error:
        assert "in use" in str(error), error
print("done", flush=True)
sys.stdin.readline()
for end in held:
    end.close()
"""


def leave_dead(address: str, *, lock: bool = True) -> None:
    """The files of a killed engine."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path(address)))
    if lock:
        Path(f"{socket_path(address)}.lock").touch()


def start_rivals(folder: Path) -> list[subprocess.Popen[str]]:
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(folder), str(NUM_ROUNDS)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(NUM_RIVALS)
    ]
    for rival in rivals:
        assert rival.stdout is not None and rival.stdout.readline() == "ready\n"
    return rivals


def tell(rival: subprocess.Popen[str], word: str) -> None:
    assert rival.stdin is not None
    rival.stdin.write(f"{word}\n")
    rival.stdin.flush()


def rounds_won(rival: subprocess.Popen[str]) -> list[int]:
    won: list[int] = []
    assert rival.stdout is not None
    while (line := rival.stdout.readline()) != "done\n":
        won.append(int(line.removeprefix("won ")))
    return won


@pytest.mark.timeout(120)
def test_of_several_processes_that_bind_at_once_one_wins_and_its_socket_stays(tmp_path: Path) -> None:
    for number in range(0, NUM_ROUNDS, 2):  # in every other round a killed engine was there before
        leave_dead(f"ipc://{tmp_path}/{number}", lock=number % 4 == 0)
    rivals = start_rivals(tmp_path)
    start = time.time() + 0.1
    for rival in rivals:
        tell(rival, str(start))
    won = [rounds_won(rival) for rival in rivals]
    assert sorted(number for rounds in won for number in rounds) == list(range(NUM_ROUNDS))
    for number in range(NUM_ROUNDS):
        assert is_serving(f"ipc://{tmp_path}/{number}")
    for rival in rivals:
        tell(rival, "leave")
        assert rival.wait(20) == 0
        for stream in (rival.stdin, rival.stdout):
            assert stream is not None
            stream.close()
    assert list(tmp_path.iterdir()) == []


def test_claims_that_come_and_go_never_overlap(tmp_path: Path) -> None:
    """A lock file that was given up is removed, and somebody may have opened it before."""
    address, inside = f"ipc://{tmp_path}/x", tmp_path / "inside"
    errors: list[BaseException] = []

    def come_and_go() -> None:
        try:
            for _ in range(150):
                claim = AddressClaim(address, timeout_s=30.0)
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                inside.unlink()
                claim.release()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == []


def test_a_claim_waits_for_one_who_is_only_clearing_away(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/x"
    first = AddressClaim(address)
    threading.Timer(0.05, first.release).start()
    AddressClaim(address).release()


def test_a_claimed_address_is_refused_before_anyone_listens_there(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/x"
    claim = AddressClaim(address)
    with pytest.raises(ConfigError, match="in use"):
        RouterEnd(address, FrontendToCore)
    with RouterEnd[Any](address, FrontendToCore, claim=claim):
        assert is_serving(address)
    claim.release()  # the end has done it: nothing of a later owner may be touched
    with RouterEnd[Any](address, FrontendToCore):
        claim.release()
        assert is_serving(address)


def test_what_a_killed_engine_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/x"
    leave_dead(address)
    remove_dead_socket(address)
    assert list(tmp_path.iterdir()) == []
    socket_path(address).write_text("precious")
    remove_dead_socket(address)
    assert socket_path(address).read_text() == "precious"
    socket_path(address).unlink()
    with RouterEnd[Any](address, FrontendToCore):
        remove_dead_socket(address)
        assert is_socket(address) and is_serving(address)
    remove_dead_socket(f"ipc://{tmp_path}/missing/x")


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot bind"):
        AddressClaim(f"ipc://{tmp_path}/x")
    assert not (tmp_path / "elsewhere").exists()
