"""Options from a YAML file: the names of flags, with or without their dashes, and their values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tercet.errors import ConfigError


def arguments_of_file(path: str) -> list[str]:
    """The file's options as they would stand on the command line; `model` is the argument without a name.

    Raises:
        ConfigError: it cannot be read, or is no mapping of names to values.
    """
    try:
        data = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("config", f"{path} cannot be read: {why}") from None
    except yaml.YAMLError as error:
        raise ConfigError("config", f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return []
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ConfigError("config", f"{path} must be a mapping of option names to values")
    model = [] if data.get("model") is None else [str(data["model"])]
    flags = [arg for name, value in data.items() if name != "model" for arg in _arguments(name, value)]
    return [*model, *flags]


def _arguments(name: str, value: Any) -> list[str]:
    flag = "--" + name.lstrip("-").replace("_", "-")
    match value:
        case None:
            return []
        case True:
            return [flag]
        case False:
            return [flag.replace("--", "--no-", 1)]
        case dict():
            return [f"{flag}={json.dumps(value)}"]
        case list() if name.replace("-", "_").startswith("allowed_"):
            return [f"{flag}={json.dumps(value)}"]
        case list():
            return [flag, *map(str, value)]
        case _:
            return [f"{flag}={value}"]
