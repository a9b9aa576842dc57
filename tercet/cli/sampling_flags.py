"""Sampling parameters as flags. A flag that is not given leaves the choice to the model's own defaults."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.frontend.sampling_params import SamplingParams

_PREFIX = "sampling_"

# Field -> (arguments of add_argument, description).
_FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": ({"type": int, "metavar": "N"}, "longest answer, in tokens"),
    "temperature": (
        {"type": float, "metavar": "X"},
        "0 takes the likeliest token always, higher is more varied, to 2 (default: the model's, or 0)",
    ),
    "top_p": (
        {"type": float, "metavar": "X"},
        "sample from the likeliest tokens that together have this probability",
    ),
    "top_k": ({"type": int, "metavar": "N"}, "sample from the N likeliest tokens; 0 is all"),
    "min_p": ({"type": float, "metavar": "X"}, "leave out tokens less likely than X times the likeliest"),
    "repetition_penalty": (
        {"type": float, "metavar": "X"},
        "above 1 makes tokens of prompt and answer less likely",
    ),
    "presence_penalty": (
        {"type": float, "metavar": "X"},
        "lowers the logit of tokens already in the answer, -2 to 2",
    ),
    "frequency_penalty": ({"type": float, "metavar": "X"}, "the same for each time that they are in it"),
    "seed": ({"type": int, "metavar": "N"}, "equal seeds give equal answers (default: drawn anew)"),
    "stop": ({"action": "append", "metavar": "TEXT"}, "end the answer before this text; may be repeated"),
    "min_tokens": ({"type": int, "metavar": "N"}, "shortest answer, in tokens"),
    "bad_words": ({"action": "append", "metavar": "TEXT"}, "words never to be generated; may be repeated"),
    "ignore_eos": ({"action": "store_true"}, "go on after the model's end-of-sequence token"),
    "skip_special_tokens": (
        {"action": argparse.BooleanOptionalAction},
        "leave special tokens out of the text (default: yes)",
    ),
}


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Add the flags as a group.

    Args:
        max_tokens: the command's default.
    """
    group = parser.add_argument_group("sampling")
    for name, (options, description) in _FLAGS.items():
        words = f"{description} (default: {max_tokens})" if name == "max_tokens" else description
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, dest=_PREFIX + name, default=argparse.SUPPRESS, help=words, **options)
    parser.set_defaults(default_max_tokens=max_tokens)


def sampling_params(args: argparse.Namespace, model_defaults: Mapping[str, float | int]) -> SamplingParams:
    """Parameters of a streamed answer: what was given, else the model's defaults, else greedy.

    Raises:
        ValidationError: a value is out of range.
    """
    from tercet.frontend.sampling_params import RequestOutputKind, SamplingParams

    given = {key.removeprefix(_PREFIX): value for key, value in vars(args).items() if key.startswith(_PREFIX)}
    defaults = {"temperature": 0.0, "max_tokens": args.default_max_tokens, **model_defaults}
    return SamplingParams.from_optional(**{**defaults, **given}, output_kind=RequestOutputKind.DELTA)
