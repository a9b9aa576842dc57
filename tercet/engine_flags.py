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
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from tercet import config
from tercet.config import EngineArgs, SimulationConfig

# Group -> field -> description. A default that is not None is appended.
GROUPS: dict[str, dict[str, str]] = {
    "model": {
        "model": "a directory in Hugging Face form, a .gguf file or a hub id (default: the default model)",
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
        "seed": "of `LLM`, whose requests without a seed of their own get one from it",
    },
    "device and memory": {
        "device": "where the model runs; 'auto' is a GPU where there is one, 'simulated' runs no model",
        "num_threads": "CPU threads of the worker (default: every core that may be used)",
        "enforce_eager": "launch every step's kernels one by one, without CUDA graphs",
        "batch_invariant": "tokens do not depend on what else is in a batch, bit for bit; slower",
        "block_size": "tokens of one KV cache block",
        "kv_cache_dtype": "of cached keys and values; 'auto' is the model's, 'fp8' halves their memory",
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
    "logging": {
        "disable_log_stats": "leave out the line of statistics that is logged every 10 s of work",
        "otlp_traces_endpoint": "URL of an OpenTelemetry collector (OTLP over HTTP) that gets a trace of each request",
        "enable_log_requests": "log one record for each request when it has ended, as JSON",
    },
}

_CHOICES: dict[str, tuple[str, ...]] = {
    "device": config.DEVICES,
    "dtype": config.DTYPES,
    "load_format": config.LOAD_FORMATS,
    "kv_cache_dtype": config.KV_CACHE_DTYPES,
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


def add_flags(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    kind: type[EngineArgs],
    *,
    leave_out: Collection[str] = (),
    prefix: str = "",
    with_defaults: bool = True,
) -> None:
    """Add a flag for each field of `kind`, in groups.

    Args:
        parser: or one group of its flags, which then gets them all.
        leave_out: fields that get none.
        prefix: of the names that the values have in the parsed namespace, before the field's.
        with_defaults: fields that are not given have their default there; False leaves them out.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in leave_out}
    for title, descriptions in GROUPS.items():
        group: argparse.ArgumentParser | argparse._ArgumentGroup = parser
        if isinstance(parser, argparse.ArgumentParser):
            group = parser.add_argument_group(f"engine: {title}")
        for name in filter(fields.__contains__, descriptions):
            default = _default(fields[name])
            words = f"{descriptions[name]}{_shown(default)}".replace("%", "%%")
            action = group.add_argument(
                "--" + name.replace("_", "-"),
                dest=prefix + name,
                default=argparse.SUPPRESS,
                help=words,
                **_options(name, hints[name]),
            )
            if with_defaults:  # only now: argparse would add some to the help itself
                action.default = default


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
        return {"metavar": "MODEL" if name == "model" else "TEXT"}
    return {"type": _json_parser(SimulationConfig if name == "simulation" else dict), "metavar": "JSON"}


def _json_parser(kind: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return msgspec.json.decode(text, type=kind)
        except msgspec.MsgspecError as error:
            problem = f"must be a JSON object such as '{{\"key\": 1}}'; got {text!r} ({error})"
            raise argparse.ArgumentTypeError(problem) from None

    return parse


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown(default: Any) -> str:
    """A default as the end of a description; nothing for those that the description names itself."""
    if default is None or default == {}:
        return ""
    if isinstance(default, bool):
        return f" (default: {'yes' if default else 'no'})"
    return f" (default: {default})"
