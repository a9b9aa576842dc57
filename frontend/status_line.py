"""One line on a terminal that says what is going on: the progress of an engine's start."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from typing import TextIO

_BAR_WIDTH = 24
_SHARE = re.compile(r"(.*) (\d+)/(\d+)")
_ERASE_LINE = "\r\x1b[K"


class StatusLine:
    """One line on stderr that is written over and over; nothing where stderr is not a terminal.

    `show` may be called from any thread. As a context manager it erases the line at the end.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._enabled = self._stream.isatty()
        self._lock = threading.Lock()
        self._shown = False

    def show(self, words: str) -> None:
        """Show what is going on; words that end in `done/total` are drawn as a bar."""
        if not self._enabled:
            return
        width = shutil.get_terminal_size().columns - 1
        with self._lock:
            self._stream.write(_ERASE_LINE + with_bar(words)[:width])
            self._stream.flush()
            self._shown = True

    def clear(self) -> None:
        with self._lock:
            if self._shown:
                self._stream.write(_ERASE_LINE)
                self._stream.flush()
                self._shown = False

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


def with_bar(words: str) -> str:
    """`worker 0: loading weights 3/4` -> `worker 0: loading weights [##################      ]  75%`."""
    match = _SHARE.fullmatch(words)
    if match is None:
        return f"{words} …"
    phase, done, total = match.group(1), int(match.group(2)), int(match.group(3))
    share = min(1.0, done / total) if total else 0.0
    filled = "#" * int(share * _BAR_WIDTH)
    return f"{phase} [{filled:<{_BAR_WIDTH}}] {share:4.0%}"
