"""The `tercet` command: parses arguments, runs a command, and turns errors into one line and an exit code.

One module for each command, with `add_parser` and `run`. What a command needs is imported when it runs, so
that `tercet --help` answers at once.

Exit codes: 0 done; 1 the command failed; 2 the arguments cannot work; 130 interrupted by Ctrl-C; 143 ended by
SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from tercet.cli import bench, chat, complete, engine, environment, models, run_batch, serve
from tercet.errors import ConfigError, StartupError, TercetError, ValidationError
from tercet.utils.argparse_utils import FlexibleArgumentParser
from tercet.version import __version__

COMMANDS = (serve, chat, complete, engine, bench, run_batch, models, environment)

_FAILED, _BAD_ARGUMENTS, _INTERRUPTED = 1, 2, 130


class _Formatter(argparse.HelpFormatter):
    """Help with a column wide enough for most flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class _Parser(FlexibleArgumentParser):
    """Errors as one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(_BAD_ARGUMENTS, f"tercet: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="tercet",
        description="An LLM serving engine of three kinds of process that talk only by messages.",
        epilog="`tercet COMMAND --help` shows what a command takes. TERCET_LOGGING_LEVEL=DEBUG shows what "
        "the processes do.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"tercet {__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", parser_class=_Parser
    )
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        names = ", ".join(command.NAME for command in COMMANDS)
        parser.error(f"name a command: {names}")
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except (ConfigError, ValidationError) as error:
        return _fail(error, _BAD_ARGUMENTS)
    except StartupError as error:
        return _fail(error, _BAD_ARGUMENTS if error.field else _FAILED)
    except TercetError as error:
        return _fail(error, _FAILED)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        _give_up_stdout()
        return _FAILED
    except OSError as error:  # no space left for our output, no permission, …
        _give_up_stdout()
        return _fail(error, _FAILED)
    finally:
        signal.signal(signal.SIGTERM, before)


def _give_up_stdout() -> None:
    """Where it cannot take what is still to be written: else the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception, code: int) -> int:
    words = " ".join(str(error).split())  # on one line, whatever it quotes
    print(f"tercet: error: {words}", file=sys.stderr)
    return code


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM leaves by the same way as an error: engines that this process started are stopped."""
    raise SystemExit(128 + number)
