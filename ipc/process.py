"""The parent's side of a child process: start, readiness with progress, death, ordered stop.

Children are programs (`python -m module`), not forks: configuration goes in as bytes on an inherited
descriptor, reports come back on a pipe, and a second pipe that only the parent holds open tells the child
by its end-of-file that the parent is gone. `child.py` is the other side.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tercet.ipc.child import LEAVE, LEAVE_AFTER_FAULT, Report

_MAX_REPORT_BYTES = 1 << 20


@dataclass(frozen=True)
class ProcessSpec:
    """A child to start: `python -m module` with `config` on a descriptor."""

    name: str  # as shown in logs: 'core', 'worker 0'
    module: str
    config: bytes
    env: tuple[tuple[str, str], ...] = ()  # added to the child's environment only


class Child:
    """A running child process. Start it from a thread that lives as long as it should.

    (The kernel's parent-death signal fires when the starting *thread* ends.)
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        config_fd = _memory_file(spec.config)
        life_r, self._life_w = os.pipe()
        self.report_fd, report_w = os.pipe()
        os.set_blocking(self.report_fd, False)
        fds = (config_fd, life_r, report_w)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", spec.module, f"--fds={config_fd},{life_r},{report_w}"],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env=_child_env(spec),
                process_group=0,  # Ctrl-C in the terminal is the parent's to handle
            )
        finally:
            for fd in fds:
                os.close(fd)
        self.pidfd = os.pidfd_open(self._process.pid)
        self._partial = b""
        self._decoder = msgspec.json.Decoder(Report)
        self._closed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal, or None while it runs."""
        return self._process.poll()

    def reports(self) -> list[Report]:
        """What the child reported since the last call. Malformed lines are its stray output, and skipped."""
        while True:
            try:
                data = os.read(self.report_fd, 65536)
            except BlockingIOError:
                break
            if not data:
                break
            self._partial += data
            if len(self._partial) > _MAX_REPORT_BYTES:
                self._partial = b""
        *lines, self._partial = self._partial.split(b"\n")
        found = []
        for line in lines:
            try:
                found.append(self._decoder.decode(line))
            except msgspec.MsgspecError:
                continue
        return found

    def describe_exit(self) -> str:
        """How it ended, in words."""
        code = self._process.wait()
        if code >= 0:
            return f"exited with code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was killed by {name}"

    def terminate(self, *, fault: bool = False) -> None:
        """Ask it to leave (SIGTERM), saying whether that is because another process of the engine died."""
        if self._process.poll() is None:
            try:  # so that it knows the signal from that of its parent's death
                os.write(self._life_w, LEAVE_AFTER_FAULT if fault else LEAVE)
            except OSError:
                pass  # it has just closed its end
            self._process.terminate()

    def kill(self) -> None:
        """End it now (SIGKILL)."""
        if self._process.poll() is None:
            self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most `timeout_s`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Let go of its descriptors; a child still running sees that as the parent's death. Idempotent."""
        if not self._closed:
            self._closed = True
            for fd in (self.pidfd, self.report_fd, self._life_w):
                os.close(fd)


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("tercet-config")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _child_env(spec: ProcessSpec) -> dict[str, str]:
    """The parent's environment, with the folder that holds this `tercet` first on the path."""
    import tercet

    root = str(Path(tercet.__file__).parent.parent)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **dict(spec.env)}
