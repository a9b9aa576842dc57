"""`tercet models`: what is on this machine, and fetching the default model."""

from __future__ import annotations

import argparse
from typing import Any

NAME = "models"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        help="list models on this machine, or fetch the default one",
        description="List the models that need no download: the default model, .gguf files in the cache, and "
        "what the hub's cache holds. `tercet models fetch` downloads the default model (98 MB).",
    )
    parser.add_argument(
        "action", nargs="?", choices=("list", "fetch"), default="list", help="what to do (default: list)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return _fetch() if args.action == "fetch" else _list()


def _list() -> int:
    from tercet.default_model import list_models
    from tercet.model_source import FETCH_COMMAND

    models = list_models()
    if not models:
        print(f"No models here; `{FETCH_COMMAND}` gets the default one.")
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        print(f"{model.name:<{width}}  {model.size_bytes / 1e6:>9,.0f} MB  {model.path}")
    return 0


def _fetch() -> int:
    from tercet.default_model import fetch_default_model
    from tercet.errors import ModelNotFoundError
    from tercet.model_source import resolve_model

    try:
        path = resolve_model(None).path
        print(f"already here: {path}")
    except ModelNotFoundError:
        print(fetch_default_model())
    return 0
