"""`tercet engine`: an engine alone, which frontends connect to."""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.cli.engine_flags import add_engine_flags, engine_args
from tercet.errors import ConfigError, EngineDeadError

if TYPE_CHECKING:
    from tercet.config import EngineConfig

NAME = "engine"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet engine [MODEL] [--address ADDRESS] [options]",
        help="run an engine alone, for frontends to connect to",
        description="Run an engine alone. Once it is ready its socket exists and its address is printed; "
        "frontends then attach with AsyncLLM.connect(ADDRESS) or `tercet chat --connect ADDRESS`. SIGINT "
        "(Ctrl-C), SIGTERM, SIGHUP or SIGQUIT ends it in order, a second one at once.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a directory in Hugging Face form, a .gguf file or a hub id (default: the default model)",
    )
    parser.add_argument(
        "--address", metavar="ADDRESS", help="ipc:///path of its socket (default: in a private directory)"
    )
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal (then 0) or until a process dies (then EngineDeadError)."""
    from tercet import log
    from tercet.ipc.address import check_address

    log.configure("engine")
    if args.address is not None:
        check_address(args.address)
    config = engine_args(args.model, args).create_engine_config()
    with _Signals() as signals, _socket_directory(args.address):
        problem = _serve(config, args.address, signals)
    if problem is not None:
        raise EngineDeadError(f"the engine has died: {problem}")
    return 0


def _serve(config: EngineConfig, address: str | None, signals: _Signals) -> str | None:
    """Why the engine ended: words where a process died, None where a signal asked for it."""
    from tercet.frontend.launcher import EngineProcesses
    from tercet.frontend.status_line import StatusLine

    with StatusLine() as status:
        processes = EngineProcesses(config, address=address, progress=status.show)
        processes.on_death = signals.events.put
        try:
            with signals.raised():
                processes.start()
            status.clear()
            print(processes.address, flush=True)
            return signals.events.get()
        except _Stopped:
            return None
        finally:
            processes.stop()


class _Stopped(BaseException):
    """A signal came while the engine was starting."""


class _Signals:
    """SIGINT, SIGTERM, SIGHUP and SIGQUIT, while entered. The first asks to stop; a second ends this process at
    once, and the engine's processes by that, for they see that their parent is gone. What is ignored stays so, as
    SIGHUP does under nohup.

    `events` gets None for the first signal, and is where a death's words may be put.
    """

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._asked = False
        self._raise = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within, the first signal also raises _Stopped, to end a wait for something else; on entering, where it
        has come before.
        """
        self._raise = True
        try:
            if self._asked:
                raise _Stopped
            yield
        finally:
            self._raise = False

    def _on_signal(self, number: int, frame: object) -> None:
        if self._asked:
            os._exit(128 + number)
        self._asked = True
        self.events.put(None)
        print("tercet: stopping; a second signal stops at once", file=sys.stderr)
        if self._raise:
            raise _Stopped


@contextmanager
def _socket_directory(address: str | None) -> Iterator[None]:
    """Make the directory of the address, mode 0700, where there is none, and remove it again at the end.

    Raises:
        ConfigError: it cannot be made. Found out now rather than after the model has loaded.
    """
    from tercet.ipc.address import socket_path

    directory = socket_path(address).parent if address is not None else None
    made = directory is not None and _make_directory(directory)
    try:
        yield
    finally:
        if made and directory is not None:
            try:
                directory.rmdir()
            except OSError:  # someone has put something there
                pass


def _make_directory(directory: Path) -> bool:
    """Whether it had to be made."""
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError("address", f"{directory} cannot be made: {error.strerror}") from None
    return True
