"""`tercet bench`: measure a server, or an engine offline."""

from __future__ import annotations

import argparse
from typing import Any

from tercet.cli.bench import latency, serve, throughput

NAME = "bench"
COMMANDS = (serve, throughput, latency)


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        help="measure a server, or an engine offline",
        description="Benchmarks with the flags, figures and result files of vLLM's.",
    )
    kinds = parser.add_subparsers(
        title="benchmarks", metavar="BENCHMARK", required=True, parser_class=type(parser)
    )
    for command in COMMANDS:
        command.add_parser(kinds)
