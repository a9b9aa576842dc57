"""Logging: one line per record, naming the process it came from.

As a library Tercet configures nothing: its records go to the logger `tercet` and below, and the host program
decides what becomes of them. A process that is Tercet's own (the command line, the core, a worker) calls
`configure` once, at its start.

    INFO 11-23 20:37:05.123 core[4711] scheduler.py:88 preempted request 7: no free block
"""

import logging
import sys
from typing import TextIO

from tercet import envs

_ROOT_NAME = "tercet"
_LINE = (
    "%(levelname)s %(asctime)s.%(msecs)03d {process_name}[%(process)d] %(filename)s:%(lineno)d %(message)s"
)
_TIME = "%m-%d %H:%M:%S"

# Without a handler, Python would print warnings of a library to stderr; the host is to decide.
logging.getLogger(_ROOT_NAME).addHandler(logging.NullHandler())


class _OneLineFormatter(logging.Formatter):
    """Escapes line breaks in a message, so that request data cannot forge a second record.

    A traceback, which is ours, keeps its lines.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: `logger = get_logger(__name__)`.

    Raises:
        ValueError: name is not inside the package, so `configure` would not reach it.
    """
    if name != _ROOT_NAME and not name.startswith(_ROOT_NAME + "."):
        raise ValueError(f"logger name {name!r} must start with 'tercet.'; pass the module's __name__")
    return logging.getLogger(name)


def configure(process_name: str, stream: TextIO | None = None) -> None:
    """Send the records of this process to `stream` (default: stderr), from TERCET_LOGGING_LEVEL on.

    For Tercet's own processes only; a repeated call replaces the handler of the call before.

    Args:
        process_name: short name shown on each line: "cli", "core", "worker 0".

    Raises:
        ConfigError: TERCET_LOGGING_LEVEL is not a level.
    """
    level = envs.TERCET_LOGGING_LEVEL
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_OneLineFormatter(_LINE.format(process_name=process_name.replace("%", "%%")), _TIME))
    logger = logging.getLogger(_ROOT_NAME)
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False  # the process is ours: the root logger would print each line again


class RepeatedWarning:
    """A warning that anyone can set off as often as they like: the first is logged, then a count now and then."""

    def __init__(self, logger: logging.Logger, interval_s: float) -> None:
        """
        Args:
            interval_s: least time between two records.
        """
        self._logger = logger
        self._interval_s = interval_s
        self._logged_at = float("-inf")
        self._count = 0  # not logged yet
        self._last: tuple[str, tuple[object, ...]] = ("", ())

    @property
    def pending(self) -> bool:
        """Whether something was counted that no record tells of yet."""
        return self._count > 0

    def warn(self, now: float, message: str, *args: object) -> None:
        """Log this, or count it where the last record is less than the interval ago.

        Args:
            now: time.monotonic().
        """
        self._count += 1
        self._last = (message, args)
        self.flush(now)

    def flush(self, now: float) -> None:
        """Log what was counted, if it is time for it."""
        if not self._count or now - self._logged_at < self._interval_s:
            return
        message, args = self._last
        if self._count > 1:
            message, args = f"{message} (the last of %d)", (*args, self._count)
        self._logger.warning(message, *args)
        self._logged_at, self._count = now, 0
