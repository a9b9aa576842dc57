"""The private directory that holds an engine's sockets: mode 0700, removed by the last to leave.

A lock on a file inside says that the process that made it still lives. Where that one is killed, its core
removes the directory; where both are, the next start does, as it does with any directory that nobody holds.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path

_PREFIX = "tercet-"
_LOCK = "lock"


class RuntimeDir:
    """A fresh private directory. `close` removes it."""

    def __init__(self, base: Path | None = None) -> None:
        base = base or Path(tempfile.gettempdir())
        sweep(base)
        self.path = base / f"{_PREFIX}{os.getuid()}-{secrets.token_hex(6)}"
        # Gets its name once it is locked: another start that sweeps just now must not find it without.
        unnamed = base / f".{self.path.name}"
        unnamed.mkdir(mode=0o700)
        self._lock_fd = os.open(unnamed / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        unnamed.rename(self.path)
        self._closed = False
        self._pid = os.getpid()

    def address(self, name: str) -> str:
        """The ipc:// address of a socket in it."""
        return f"ipc://{self.path / name}"

    def close(self) -> None:
        """Remove the directory. Idempotent; a forked child leaves it to its parent."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)


def remove(path: Path) -> None:
    """Remove an engine's directory on behalf of a parent that died."""
    if path.name.startswith(_PREFIX):
        shutil.rmtree(path, ignore_errors=True)


def sweep(base: Path) -> None:
    """Remove what killed engines of this user left behind."""
    for path in base.glob(f"{_PREFIX}{os.getuid()}-*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # just removed
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # alive
        finally:
            os.close(fd)
