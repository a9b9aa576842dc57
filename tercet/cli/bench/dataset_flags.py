"""Flags of datasets, for every benchmark that has one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tercet.errors import ConfigError

if TYPE_CHECKING:
    from tercet.bench.datasets import DatasetConfig

_DATASETS = ("random", "sharegpt", "custom", "prefix_repetition")
# Flag -> (default, description), of whole numbers.
_LENGTHS: dict[str, tuple[int | None, str]] = {
    "random-input-len": (1024, "tokens of a random prompt, special ones included"),
    "random-output-len": (128, "tokens of the answer to a random prompt"),
    "random-prefix-len": (0, "tokens that all random prompts begin with, besides random-input-len"),
    "sharegpt-output-len": (None, "tokens of each answer (default: as many as the file's)"),
    "custom-output-len": (256, "tokens of each answer; -1 takes output_tokens of each line"),
    "prefix-repetition-prefix-len": (256, "tokens of each prefix"),
    "prefix-repetition-suffix-len": (256, "tokens after the prefix"),
    "prefix-repetition-num-prefixes": (10, "how many prefixes there are"),
    "prefix-repetition-output-len": (128, "tokens of each answer"),
}


def add_dataset_flags(parser: argparse.ArgumentParser) -> None:
    """Add them as a group."""
    group = parser.add_argument_group("dataset")
    group.add_argument("--dataset-name", choices=_DATASETS, default="random", help="(default: random)")
    group.add_argument(
        "--dataset-path",
        type=Path,
        metavar="FILE",
        help='JSON in ShareGPT\'s form (sharegpt), or lines of {"prompt": …} (custom)',
    )
    group.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="requests (default: 1000)")
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: 0)"
    )
    group.add_argument(
        "--input-len", type=int, metavar="N", help="tokens of each prompt; as --random-input-len"
    )
    group.add_argument("--output-len", type=int, metavar="N", help="tokens of each answer, for every dataset")
    group.add_argument("--disable-shuffle", action="store_true", help="keep the order of the file")
    group.add_argument("--no-oversample", action="store_true", help="use no prompt of the file twice")
    group.add_argument(
        "--skip-chat-template", action="store_true", help="send prompts of a custom file as they are"
    )
    group.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="X",
        help="random lengths are drawn from [len·(1-X), len·(1+X)] (default: 0)",
    )
    group.add_argument(
        "--random-vocab-size",
        type=int,
        metavar="N",
        help="send synthetic prompts as random token ids below N; needs no tokenizer",
    )
    for flag, (default, words) in _LENGTHS.items():
        shown = words if default is None else f"{words} (default: {default})"
        group.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=shown)


def dataset_config(args: argparse.Namespace) -> DatasetConfig:
    """The dataset of a parsed command line.

    Raises:
        ConfigError: the flags do not go together.
    """
    from tercet.bench.datasets import DatasetConfig

    fields = {name: getattr(args, name) for name in DatasetConfig.__struct_fields__ if hasattr(args, name)}
    if args.input_len is not None:
        if args.dataset_name != "random":
            raise ConfigError("input_len", f"does not go with --dataset-name {args.dataset_name}")
        fields["random_input_len"] = args.input_len
    if args.output_len is not None:
        fields |= {name: args.output_len for name in fields if name.endswith("_output_len")}
    return DatasetConfig(name=args.dataset_name, path=args.dataset_path, **fields)
