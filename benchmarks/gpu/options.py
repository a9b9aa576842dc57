"""What the programs of this folder share on their command lines."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu import environment
from benchmarks.gpu.engines import Plan
from benchmarks.gpu.results import Results, slug
from benchmarks.gpu.shapes import SHAPES
from tercet.config import SimulationConfig


def parser(description: str | None, shapes: str) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        shapes: measured where none are named.

    Also quietens the engines' logs: what a program prints is its own, unless TERCET_LOGGING_LEVEL is set.
    """
    os.environ.setdefault("TERCET_LOGGING_LEVEL", "WARNING")
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--shapes", type=names(SHAPES), default=shapes, help=f"default {shapes}")
    made.add_argument("--time-limit", type=float, default=1800.0, metavar="SECONDS", help="default 1800")
    made.add_argument(
        "--scale", choices=("full", "tiny"), default="full", help="tiny: small enough for a CPU"
    )
    made.add_argument("--device", choices=("auto", "cuda", "cpu", "simulated"), default="auto")
    made.add_argument("--commit", help="the commit measured, where git cannot tell")
    made.add_argument("--out", type=Path, default=environment.RESULTS, help="folder of the JSON file")
    made.add_argument("--tokenizer", default="", metavar="DIR", help="shape S's tokenizer")
    made.add_argument(
        "--engine-args", type=_object, default={}, metavar="JSON", help="further engine arguments"
    )
    return made


def names(known: Any) -> Callable[[str], list[str]]:
    """A type for argparse: a comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: there are {', '.join(known)}")
        return chosen

    return parse


def numbers(text: str) -> list[int]:
    """A type for argparse: a comma-separated list of positive numbers."""
    chosen = [int(part) for part in text.split(",")]
    if not all(value > 0 for value in chosen):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of 1 or more")
    return chosen


def plan(args: argparse.Namespace, folder: Path) -> Plan:
    """Which engines the options ask for; model folders are made in `folder`."""
    return Plan(folder, args.device, args.scale == "tiny", args.tokenizer, args.engine_args)


def results(args: argparse.Namespace, program: str, settings: dict[str, Any]) -> Results:
    """An empty set of results, whose file is named by program, device and time."""
    found = environment.describe(args.commit)
    gpu = slug(found["gpu"]) if args.device in ("auto", "cuda") else args.device
    stamp = found["date"].replace(":", "").replace("-", "")
    return Results(args.out / f"gpu_{program}_{gpu}_{stamp}.json", found, settings)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: a JSON object, such as '{{\"block_size\": 32}}'")
    if "simulation" in value:
        value["simulation"] = msgspec.convert(value["simulation"], SimulationConfig)
    return value
