"""Entry point of the core process: `python -m tercet.core_proc`, started by the launcher."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec

from tercet.ipc.child import ChildProcess, adopt


def run(child: ChildProcess) -> int:
    """Run the core; returns the exit code."""
    try:
        from tercet.core_proc.main import main

        return main(child)
    finally:
        if child.is_orphaned():
            _remove_directory(child)


def _remove_directory(child: ChildProcess) -> None:
    from tercet.config import ProcessConfig
    from tercet.ipc import runtime_dir

    config = msgspec.msgpack.decode(child.config, type=ProcessConfig)
    runtime_dir.remove(Path(config.runtime_dir))


if __name__ == "__main__":
    # SIGTERM, not SIGKILL: this process removes the socket files of an engine whose parent was killed.
    sys.exit(run(adopt(signal.SIGTERM)))
