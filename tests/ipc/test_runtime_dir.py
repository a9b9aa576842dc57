"""The directory of an engine's sockets: private, removed by its owner, swept by the next start."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tercet.ipc.runtime_dir import RuntimeDir, remove, sweep
from tests.ipc.helpers.processes import ROOT


def folders(base: Path) -> list[Path]:
    return sorted(base.iterdir())


def test_it_is_fresh_private_and_goes_when_closed(tmp_path: Path) -> None:
    first, second = RuntimeDir(tmp_path), RuntimeDir(tmp_path)
    assert first.path != second.path
    for directory in (first, second):
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        (directory.path / "core").touch()
        assert directory.address("core") == f"ipc://{directory.path}/core"
    first.close()
    first.close()
    assert folders(tmp_path) == [second.path]
    second.close()
    assert folders(tmp_path) == []


def _abandon(base: Path) -> Path:
    """The directory of a process that was killed."""
    code = (
        "import os, signal, sys; from pathlib import Path; from tercet.ipc.runtime_dir import RuntimeDir;"
        "print(RuntimeDir(Path(sys.argv[1])).path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(base)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    return Path(done.stdout.strip())


def test_the_next_start_sweeps_what_a_killed_one_left(tmp_path: Path) -> None:
    dead = _abandon(tmp_path)
    (dead / "core").touch()
    alive = RuntimeDir(tmp_path)
    assert folders(tmp_path) == [alive.path]
    alive.close()


def test_living_directories_are_not_swept(tmp_path: Path) -> None:
    alive = RuntimeDir(tmp_path)
    for _ in range(3):
        sweep(tmp_path)
    assert (alive.path / "lock").exists()
    alive.close()


def test_what_is_not_ours_is_not_swept(tmp_path: Path) -> None:
    """Other names, directories without a lock, links, and directories of other users."""
    prefix = f"tercet-{os.getuid()}-"
    kept = [
        tmp_path / "precious",
        tmp_path / f"{prefix}without-lock",
        tmp_path / f"tercet-{os.getuid() + 1}-x",
    ]
    for path in kept:
        path.mkdir()
    (kept[0] / "lock").touch()
    (kept[2] / "lock").touch()
    link = tmp_path / f"{prefix}link"
    link.symlink_to(kept[0])
    sweep(tmp_path)
    assert folders(tmp_path) == sorted([*kept, link])
    assert (kept[0] / "lock").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make files of another user")
def test_a_directory_of_another_owner_under_our_name_is_not_swept(tmp_path: Path) -> None:
    path = tmp_path / f"tercet-{os.getuid()}-planted"
    path.mkdir()
    (path / "lock").touch()
    os.chown(path, 65534, 65534)
    sweep(tmp_path)
    assert path.exists()


def test_starts_at_the_same_moment_do_not_sweep_each_other(tmp_path: Path) -> None:
    """A directory must never be visible without its lock held."""
    made: list[RuntimeDir] = []
    stop = threading.Event()

    def sweep_all_the_time() -> None:
        while not stop.is_set():
            sweep(tmp_path)

    sweepers = [threading.Thread(target=sweep_all_the_time) for _ in range(2)]
    for thread in sweepers:
        thread.start()
    try:
        for _ in range(100):
            made.append(RuntimeDir(tmp_path))
            assert (made[-1].path / "lock").exists()
    finally:
        stop.set()
        for thread in sweepers:
            thread.join()
    assert all((directory.path / "lock").exists() for directory in made)
    for directory in made:
        directory.close()
    assert folders(tmp_path) == []


def test_remove_takes_only_directories_of_engines(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    remove(tmp_path / "precious")
    directory = RuntimeDir(tmp_path)
    remove(directory.path)
    remove(directory.path)
    assert folders(tmp_path) == [tmp_path / "precious"]
    directory.close()
