"""Engine arguments as flags: one for each field of `EngineArgs`, under vLLM's spelling.

A flag's kind follows from the field's type; what this module adds is its group and its description. Values
that are out of range are found by `EngineArgs` itself, so that every front door says the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from typing import Any

import msgspec

from tercet import config
from tercet.config import EngineArgs, SimulationConfig
from tercet.errors import ConfigError

_PREFIX = "engine_"

# Group -> field -> description. A default that is not None is appended.
GROUPS: dict[str, dict[str, str]] = {
    "model": {
        "tokenizer": "directory or .gguf file of the tokenizer, where it is not the model's own",
        "skip_tokenizer_init": "run without a tokenizer: token ids in, token ids out",
        "served_model_name": "names that the model goes by (default: the model argument)",
        "revision": "branch, tag or commit of a hub id",
        "hf_overrides": "JSON object that overrides entries of the model's config",
        "generation_config": "where sampling defaults come from: 'auto' is the model, 'vllm' is none",
        "override_generation_config": "JSON object that overrides sampling defaults of the model",
        "dtype": "of weights and activations; 'auto' is the model's own",
        "load_format": "of the weights; 'dummy' reads none and draws random ones",
        "max_model_len": "longest prompt and answer together, in tokens (default: the model's own limit)",
    },
    "device and memory": {
        "device": "where the model runs; 'auto' is a GPU where there is one, 'simulated' runs no model",
        "num_threads": "CPU threads of the worker (default: every core that may be used)",
        "block_size": "tokens of one KV cache block",
        "gpu_memory_utilization": "share of the GPU's memory for weights, activations and KV cache",
        "kv_cache_memory_bytes": "size of the KV cache, in place of that share",
        "num_gpu_blocks_override": "size of the KV cache in blocks, in place of either",
        "tensor_parallel_size": "GPUs that share the model; only 1 is supported yet",
        "simulation": 'JSON object for --device simulated, such as \'{"step_us": 500, "token_us": 10}\'',
    },
    "scheduling": {
        "enable_prefix_caching": "keep computed prompts for later ones that begin alike",
        "max_num_seqs": f"sequences in a step (default: {config.DEFAULT_MAX_NUM_SEQS})",
        "max_num_batched_tokens": f"tokens in a step (default: {config.DEFAULT_CPU_BATCHED_TOKENS} on a CPU, "
        f"{config.DEFAULT_CUDA_BATCHED_TOKENS} on a GPU)",
        "scheduling_policy": "who goes first: who came first, or who has the lower priority number",
        "async_scheduling": "plan a step while the one before it runs",
        "long_prefill_token_threshold": "most tokens of one prompt in one step; 0 is no limit",
        "max_long_partial_prefills": "prompts over that threshold that are computed at a time; 0 is no limit",
        "max_num_queued_reqs": "requests that may wait; more are refused (default: 65536)",
        "max_logprobs": "most log-probabilities that a request may ask for at each token",
        "audit": "check at every step that core and worker agree on what is where (slow; for debugging)",
    },
}

NOT_FLAGS = {
    "model": "an argument of its own in every command",
    "seed": "it is for programs that use LLM; here --seed is the request's own",
    "enforce_eager": "there are no graphs yet that it could switch off",
    "disable_log_stats": "chat and complete print figures of their own",
}
"""Fields without a flag, and why."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "device": config.DEVICES,
    "dtype": config.DTYPES,
    "load_format": config.LOAD_FORMATS,
    "scheduling_policy": config.POLICIES,
    "generation_config": ("auto", "vllm"),
}
_COUNTS = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"})
_COUNT = re.compile(r"(\d+(?:\.\d+)?)(?:([kmgt])|([KMGT])|([KMGT])iB)?")
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_count(text: str) -> int:
    """A whole number with a suffix: k, m, g, t are powers of 1000; K, M, G, T (or KiB …) of 1024.

    Raises:
        argparse.ArgumentTypeError: it is none, or not whole.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number such as 4096, 8k (8000), 4G or 4GiB")
    number, decimal, *binary = match.groups()
    letter = decimal or next(filter(None, binary), None)
    factor = (1000 if decimal else 1024) ** _POWERS[letter.lower()] if letter else 1
    value = float(number) * factor if "." in number else int(number) * factor
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add every engine flag, in groups."""
    hints = typing.get_type_hints(EngineArgs)
    fields = {field.name: field for field in dataclasses.fields(EngineArgs)}
    for title, descriptions in GROUPS.items():
        group = parser.add_argument_group(f"engine: {title}")
        for name, description in descriptions.items():
            flag = "--" + name.replace("_", "-")
            options = _options(name, hints[name])
            words = f"{description}{_default(fields[name])}".replace("%", "%%")
            group.add_argument(flag, dest=_PREFIX + name, default=argparse.SUPPRESS, help=words, **options)


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
    """The engine arguments of a parsed command line.

    Raises:
        ConfigError: the text of a JSON flag does not have the right form.
    """
    return EngineArgs(model=model, **given_engine_flags(args))


def given_engine_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Field -> value of the engine flags that were given."""
    given = {key.removeprefix(_PREFIX): value for key, value in vars(args).items() if key.startswith(_PREFIX)}
    for name, kind in (
        ("hf_overrides", dict[str, Any]),
        ("override_generation_config", dict[str, Any]),
        ("simulation", SimulationConfig),
    ):
        if name in given:
            given[name] = _json(name, given[name], kind)
    return given


def _json(name: str, text: str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            name, f"must be a JSON object such as '{{\"key\": 1}}'; got {text!r} ({error})"
        ) from None


def _options(name: str, hint: Any) -> dict[str, Any]:
    """Keyword arguments of `add_argument` for a field of this type."""
    if name in _CHOICES:
        return {"choices": _CHOICES[name]}
    if name in _COUNTS:
        return {"type": parse_count, "metavar": "N"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if name == "served_model_name":
        return {"nargs": "+", "metavar": "NAME"}
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if int in kinds:
        return {"type": int, "metavar": "N"}
    if float in kinds:
        return {"type": float, "metavar": "X"}
    if str in kinds:
        return {"metavar": "TEXT"}
    return {"metavar": "JSON"}


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is None or value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool):
        return f" (default: {'yes' if value else 'no'})"
    return f" (default: {value})"
