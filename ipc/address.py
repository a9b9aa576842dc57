"""Addresses of sockets: what is opened, who listens there, and who may bind.

zmq replaces whatever file is at the path that it binds, and to look before binding is not enough: two engines may
look at the same moment. So whoever binds holds a lock on the file `<socket>.lock` beside it for as long as it
listens. A killed process loses its lock, and leaves both files for the next to take over.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path
from socket import AF_UNIX
from socket import socket as UnixSocket
from typing import Final

from tercet.errors import ConfigError

MAX_IPC_PATH: Final = 100  # sun_path holds 107 bytes and zmq adds to it
_CLAIM_S: Final = 0.3  # longer than anyone holds a lock who only clears away what a killed process left


def check_address(address: str) -> str:
    """The address, if it is one that Tercet opens.

    Raises:
        ConfigError: not an ipc:// address, or its path is too long for a Unix socket.
    """
    scheme, _, path = address.partition("://") if isinstance(address, str) else ("", "", "")
    if scheme != "ipc" or not path.startswith("/"):
        which = "must be ipc:///absolute/path, such as ipc:///tmp/tercet/engine"
        no_tcp = " (a Unix socket of this machine: there is no TCP yet)" if scheme == "tcp" else ""
        raise ConfigError("address", f"{which}{no_tcp}; got {address!r:.120}")
    if len(path.encode()) > MAX_IPC_PATH:
        raise ConfigError(
            "address", f"the path of a Unix socket has at most {MAX_IPC_PATH} bytes; got {path!r}"
        )
    return address


def socket_path(address: str) -> Path:
    """The socket file of an ipc:// address."""
    return Path(address.partition("://")[2])


def is_socket(address: str) -> bool:
    """Whether the socket file of an address exists."""
    try:
        return stat.S_ISSOCK(socket_path(address).stat().st_mode)
    except OSError:
        return False


def is_serving(address: str) -> bool:
    """Whether a living process listens at an address; a killed one leaves a socket file that nobody hears."""
    with UnixSocket(AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(socket_path(address)))
        except TimeoutError:
            return True  # its queue of new connections is full
        except OSError:
            return False
    return True


def remove_dead_socket(address: str) -> None:
    """Remove what a killed process left at an address; of a living one, nothing."""
    try:
        claim = AddressClaim(address, timeout_s=0.0)
    except ConfigError:
        return
    claim.release()


class AddressClaim:
    """The right to bind an address, this process's alone from here to `release`."""

    def __init__(self, address: str, timeout_s: float = _CLAIM_S) -> None:
        """Claim; what a killed process left there is removed.

        Raises:
            ConfigError: the address is not one that Tercet opens, or is in use.
        """
        path = socket_path(check_address(address))
        self._socket = path
        self._lock = path.with_name(path.name + ".lock")
        self._fd = self._acquire(address, time.monotonic() + timeout_s)
        try:
            _check_free(address, path)
        except BaseException:
            self._unlock()
            raise
        path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go, once nobody listens there any more: removes both files. Idempotent."""
        if self._fd >= 0:
            self._socket.unlink(missing_ok=True)
            self._unlock()

    def _acquire(self, address: str, deadline: float) -> int:
        while True:
            try:
                fd = os.open(self._lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise ConfigError(
                    "address", f"cannot bind {address}: {error.strerror}: {self._lock}"
                ) from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_its_place(fd):
                    return fd
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    problem = f"{address} is in use: another engine serves there, or is about to"
                    raise ConfigError("address", problem) from None
                time.sleep(0.01)
            os.close(fd)

    def _is_at_its_place(self, fd: int) -> bool:
        """Whether the locked file is still the one of that name, not one that was just given up and removed."""
        try:
            found = os.stat(self._lock, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(fd))

    def _unlock(self) -> None:
        # While locked: who waits for it finds that it is no longer there, and begins anew.
        self._lock.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


def _check_free(address: str, path: Path) -> None:
    if path.exists() and not is_socket(address):
        raise ConfigError("address", f"{path} exists and is not a socket; choose another path")
    if is_serving(address):
        raise ConfigError("address", f"{address} is in use: another engine serves there")
