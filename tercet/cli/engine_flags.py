"""The engine flags of the commands, and which engine a command uses."""

from __future__ import annotations

import argparse
from typing import Any

from tercet.config import EngineArgs
from tercet.engine_flags import add_flags

PREFIX = "engine_"

NOT_FLAGS = {
    "model": "an argument of its own in every command",
    "seed": "it is for programs that use LLM; here --seed is the request's own",
    "enforce_eager": "there are no graphs yet that it could switch off",
    "disable_log_stats": "chat and complete print figures of their own",
}
"""Fields without a flag, and why."""


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add every engine flag, in groups."""
    # A prefix, for a command may have an argument of the same name; no defaults, to know what was given.
    add_flags(parser, EngineArgs, leave_out=NOT_FLAGS, prefix=PREFIX, with_defaults=False)


def add_session_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a command that uses an engine: which one, and how it is to be if it is started."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="a directory in Hugging Face form, a .gguf file or a hub id (default: the default model)",
    )
    group.add_argument(
        "--connect", metavar="ADDRESS", help="use the engine that listens there (ipc:///path) and start none"
    )
    add_engine_flags(parser)


def engine_args(model: str | None, args: argparse.Namespace) -> EngineArgs:
    """The engine arguments of a parsed command line."""
    return EngineArgs(model=model, **given_engine_flags(args))


def given_engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Field -> value of the engine flags that were given."""
    return {key.removeprefix(PREFIX): value for key, value in vars(args).items() if key.startswith(PREFIX)}
