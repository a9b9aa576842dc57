"""`tercet collect-env`: what a bug report needs to say about a machine."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "collect-env"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        help="print versions, hardware and settings, for a bug report",
        description="Print versions, hardware and settings, for a bug report. No secrets are printed.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tercet.collect_env import collect_env, format_env

    print(format_env(collect_env()), end="")
    return 0
