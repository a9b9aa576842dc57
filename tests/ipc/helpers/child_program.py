"""A child process that does what its configuration says: `python -m tests.ipc.helpers.child_program`.

The configuration is a line of words, carried out one after the other; see `_DO`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from tercet.ipc.child import ChildProcess, Failed, Progress, Ready


def _report_often(child: ChildProcess) -> None:
    for done in range(100):
        child.report(Progress("loading", done, 100))


def _report_slowly(child: ChildProcess) -> None:
    for done in range(4):
        child.report(Progress("loading", done, 4))
        time.sleep(0.2)


def _touch_at_sigterm(child: ChildProcess) -> None:
    """Leave a file when told to leave, so that a test sees in which order children were told."""

    def leave(*_: object) -> None:
        with open(os.environ["LEFT"], "a") as file:
            file.write(f"{os.environ['NAME']}\n")
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)


def _say_why(child: ChildProcess) -> None:
    """Be ready, wait for the signal to leave, and report what is known of its reason."""
    try:
        child.report(Ready())
        threading.Event().wait(20.0)
    except SystemExit:
        child.report(Failed(f"orphaned={child.is_orphaned()} fault={child.is_fault()}"))


_DO: dict[str, Callable[[ChildProcess], object]] = {
    "progress": _report_often,
    "slowly": _report_slowly,
    "ready": lambda child: child.report(Ready()),
    "fail": lambda child: child.report(Failed("no model at that path")),
    "last-words": lambda child: child.report(Failed("the device fell off the bus")),
    "exit-3": lambda child: sys.exit(3),
    "abort": lambda child: os.kill(os.getpid(), signal.SIGABRT),
    "stubborn": lambda child: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "say-when-left": _touch_at_sigterm,
    "garbage": lambda child: os.write(child._report_fd, b"not json\n\xff\n{}\n"),
    "stuck": lambda child: threading.Event().wait(),
    "ready-why": _say_why,
    "nap": lambda child: time.sleep(0.3),
    "echo-config": lambda child: child.report(Failed(f"{len(child.config)} {os.environ.get('GREETING')}")),
}


def main() -> None:
    child = ChildProcess.from_arguments()
    child.tie(signal.Signals(int(os.environ.get("DEATH_SIGNAL", int(signal.SIGKILL)))))
    for word in child.config.decode().split():
        _DO[word](child)


if __name__ == "__main__":
    main()
