"""Entry point of the core process: `python -m tercet.core_proc`, started by the launcher."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec

from tercet.ipc import runtime_dir
from tercet.ipc.child import ChildProcess

_FAULT_WAIT_S = 0.3


def run(child: ChildProcess) -> int:
    """Run the core; returns the exit code."""
    child.last_act = lambda: _remove_directory(child)
    try:
        # SIGTERM, not SIGKILL: this process removes the socket files of an engine whose parent was killed.
        child.tie(signal.SIGTERM)
        from tercet.core_proc.main import main

        code = main(child)
    except SystemExit:  # told to leave while importing
        code = 0
    # One that leaves by a fault of its own need not be told why. Its parent may be dying too, and took its worker.
    if child.is_orphaned(_FAULT_WAIT_S if code else 1.0):
        _remove_directory(child)
    return code


def _remove_directory(child: ChildProcess) -> None:
    """Needs no module that may be half imported when the parent dies."""
    runtime_dir.remove(Path(msgspec.msgpack.decode(child.config)["runtime_dir"]))


if __name__ == "__main__":
    sys.exit(run(ChildProcess.from_arguments()))
