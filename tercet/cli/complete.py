"""`tercet complete`: continue a text."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tercet.cli.engine_flags import add_session_flags
from tercet.cli.sampling_flags import add_sampling_flags
from tercet.errors import ConfigError

NAME = "complete"
MAX_TOKENS = 128


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet complete [PROMPT] [--model MODEL | --connect ADDRESS] [options]",
        help="continue a text",
        description="Continue a text and print the continuation as it comes. Figures go to stderr.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text (default: all of stdin)")
    add_sampling_flags(parser, max_tokens=MAX_TOKENS)
    add_session_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tercet.cli.session import open_session, print_figures, print_stream, read_stdin

    if args.prompt is None and sys.stdin.isatty():
        raise ConfigError("prompt", "give the text to continue as an argument or on stdin")
    prompt = read_stdin() if args.prompt is None else args.prompt
    with open_session(args) as session:
        output = print_stream(session.stream(prompt), [])
        print()
        print_figures(output)
    return 0
