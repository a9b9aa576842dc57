"""Configuration: what a user passes (`EngineArgs`) and what the processes are handed (`EngineConfig`).

`EngineArgs` has vLLM's names and defaults where they apply. `EngineArgs.create_engine_config()` resolves every
default once, in the process that starts the engine; the result is a tree of frozen structs that crosses to the
core and the workers as MessagePack. No torch here.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec

from tercet import sampling_ranges
from tercet.errors import ConfigError, UnsupportedModelError

Parser = TypeVar("Parser", bound="argparse.ArgumentParser | argparse._ArgumentGroup")

DEVICES = ("auto", "cpu", "cuda", "simulated")
DTYPES = ("auto", "float32", "bfloat16", "float16", "half", "float")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
POLICIES = ("fcfs", "priority")
KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3")

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_CPU_BATCHED_TOKENS = 2048
DEFAULT_CUDA_BATCHED_TOKENS = 8192
MAX_BLOCK_SIZE = 512
MAX_NUM_SEQS = 65536
MAX_TABLE_BYTES = 8 << 30  # of the core's token history and block table, a row for each sequence

# Arguments of vLLM's that Tercet does not have -> the values that ask for nothing which it does not do.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "allowed_local_media_path": ("", None),
    "code_revision": (None,),
    "compilation_config": (None, {}),
    "config_format": ("auto", "hf"),
    "convert": ("auto", "none"),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "disable_custom_all_reduce": (False,),
    "disable_sliding_window": (False,),
    "distributed_executor_backend": (None,),
    "download_dir": (None,),
    "enable_chunked_prefill": (True, None),
    "enable_expert_parallel": (False,),
    "enable_lora": (False,),
    "enable_prompt_embeds": (False,),
    "enable_sleep_mode": (False,),
    "hf_config_path": (None,),
    "hf_token": (None,),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": (None, {}),
    "logits_processors": (None,),
    "max_seq_len_to_capture": (None,),
    "mm_processor_kwargs": (None, {}),
    "model_loader_extra_config": (None, {}),
    "pipeline_parallel_size": (1,),
    "quantization": (None,),
    "runner": ("auto", "generate"),
    "speculative_config": (None,),
    "swap_space": (4, None),
    "task": ("auto", "generate", None),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
}

_BOOLS = (
    "skip_tokenizer_init",
    "enforce_eager",
    "batch_invariant",
    "enable_prefix_caching",
    "async_scheduling",
    "disable_log_stats",
    "audit",
)

# Sampling defaults: name -> type, lowest, highest. Zero is not allowed where it would mean nothing.
_SAMPLING: dict[str, tuple[type, float, float]] = {
    "temperature": (float, *sampling_ranges.TEMPERATURE),
    "top_p": (float, 0, 1),
    "top_k": (int, -1, 2**31 - 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, *sampling_ranges.REPETITION_PENALTY),
    "max_new_tokens": (int, 1, 2**31 - 1),
}
_NOT_ZERO = ("top_p",)


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Latency model of the simulated worker: a step takes step_us + token_us × tokens. 0 is as fast as it goes."""

    step_us: float = 0.0
    token_us: float = 0.0
    num_blocks: int = 4096
    verify: bool = False  # recheck the whole context of every row at every step


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and how it is read."""

    model: str  # the user's word for it
    path: str  # directory or .gguf file; empty for a simulated model
    kind: str  # 'hf', 'gguf' or 'simulated'
    served_model_name: list[str]
    architecture: str
    hf_config: str  # JSON, in the form of Hugging Face's config.json
    vocab_size: int
    max_model_len: int
    dtype: str
    load_format: str
    eos_token_ids: list[int]
    default_sampling: dict[str, float | int]
    fingerprint: str = ""
    revision: str | None = None


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The paged KV cache."""

    block_size: int  # tokens
    gpu_memory_utilization: float  # share of the device's memory for weights, activations and KV cache
    kv_cache_memory_bytes: int | None  # overrides gpu_memory_utilization
    num_blocks_override: int | None
    enable_prefix_caching: bool
    dtype: str = "auto"  # of keys and values: 'auto' is the model's, 'fp8' and 'fp8_e4m3' are float8_e4m3fn


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a step may hold, and in which order requests get into it."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str = "fcfs"
    async_scheduling: bool = True  # two steps in flight instead of one
    long_prefill_token_threshold: int = 0  # tokens of one prompt in one step, 0 is no limit
    max_long_partial_prefills: int = 0  # prompts over the threshold that prefill at a time, 0 is no limit
    max_num_queued_reqs: int = 65536  # waiting requests, n counted n times
    max_logprobs: int = 20
    max_children: int = 16384
    audit: bool = False  # plans carry the core's tables, the worker compares them with its own


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model runs."""

    device: str  # 'cpu', 'cuda' or 'simulated'
    num_threads: int  # of the CPU, for the model's arithmetic
    enforce_eager: bool = False  # no CUDA graphs
    batch_invariant: bool = False  # results do not depend on what else is in a batch
    world_size: int = 1
    simulation: SimulationConfig = SimulationConfig()


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the core hands to frontends in Welcome, without reading it: files by name."""

    files: dict[str, str] = {}  # name -> path
    tokenizer: str = ""  # directory or .gguf file; empty for the model's own
    skip_tokenizer_init: bool = False  # no tokenizer: token ids in, token ids out


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the processes of one engine are told at their start."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    worker: WorkerConfig
    frontend: FrontendConfig = FrontendConfig()

    def fingerprint(self) -> str:
        """Digest of what core and worker must agree on."""
        parts = (self.model, self.cache, self.scheduler, self.worker)
        return hashlib.blake2b(msgspec.msgpack.encode(parts), digest_size=16).hexdigest()


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one process of an engine is started with."""

    engine: EngineConfig
    worker_address: str
    frontend_address: str
    runtime_dir: str
    epoch: int
    rank: int = 0


@dataclass(kw_only=True)
class EngineArgs:
    """Arguments of an engine, under vLLM's names; None means 'choose for me'."""

    model: str | None = None  # directory, .gguf file, hub id, or None for the default model
    tokenizer: str | None = None  # directory or .gguf file, where it is not the model's
    skip_tokenizer_init: bool = False  # token ids in, token ids out
    served_model_name: str | list[str] | None = None
    revision: str | None = None
    hf_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: str = "auto"  # 'auto': defaults from the model's generation_config; 'vllm': none
    override_generation_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "auto"
    seed: int | None = 0  # of `LLM`: its requests without a seed repeat from run to run; None: at random
    load_format: str = "auto"
    max_model_len: int | None = None
    device: str = "auto"
    num_threads: int | None = None  # CPU threads of the worker
    enforce_eager: bool = False
    batch_invariant: bool = False
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    async_scheduling: bool = True
    long_prefill_token_threshold: int = 0
    max_long_partial_prefills: int = 0
    max_num_queued_reqs: int | None = None
    max_logprobs: int = 20
    tensor_parallel_size: int = 1
    disable_log_stats: bool = False
    otlp_traces_endpoint: str | None = None  # URL of an OpenTelemetry collector, for traces of requests
    simulation: SimulationConfig | None = None  # for device='simulated'
    audit: bool = False

    @classmethod
    def add_cli_args(cls, parser: Parser) -> Parser:
        """Add a flag for each field to a program's parser, or group of its flags; returns what it was given.

        `vars(parser.parse_args())` then has every field under its name, as `LLM(**args)` takes them.
        """
        from tercet.engine_flags import add_flags

        add_flags(parser, cls)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """The arguments in what a parser found; entries that are no fields are left alone."""
        given = vars(args)
        return cls(
            **{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}
        )

    def create_engine_config(self) -> EngineConfig:
        """Check every argument and resolve every default.

        Raises:
            ConfigError: an argument has a value that cannot work; names it and the fix.
            ModelNotFoundError: no model files where `model` points.
            UnsupportedModelError: the model is none that Tercet runs, or an entry of its config is wrong.
        """
        self._check()
        device = self._resolve_device()
        self._check_invariance(device)
        model = self._model_config(device)
        scheduler = self._scheduler_config(model, device)
        return EngineConfig(
            model=model,
            cache=CacheConfig(
                block_size=self.block_size,
                gpu_memory_utilization=self.gpu_memory_utilization,
                kv_cache_memory_bytes=self.kv_cache_memory_bytes,
                num_blocks_override=self.num_gpu_blocks_override,
                enable_prefix_caching=self.enable_prefix_caching,
                dtype=self.kv_cache_dtype,
            ),
            scheduler=scheduler,
            worker=WorkerConfig(
                device=device,
                num_threads=self.num_threads or default_num_threads(),
                enforce_eager=self.enforce_eager,
                batch_invariant=self.batch_invariant,
                simulation=self.simulation or SimulationConfig(),
            ),
            frontend=FrontendConfig(
                tokenizer=self.tokenizer or "", skip_tokenizer_init=self.skip_tokenizer_init
            ),
        )

    def _check(self) -> None:
        for name in _BOOLS:
            _boolean(name, getattr(self, name))
        for name in ("model", "tokenizer", "revision", "otlp_traces_endpoint"):
            _text(name, getattr(self, name))
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("scheduling_policy", self.scheduling_policy, POLICIES)
        _one_of("generation_config", self.generation_config, ("auto", "vllm"))
        self._check_numbers()
        _served_names(self.served_model_name)
        _json_object("hf_overrides", self.hf_overrides)
        _json_object("override_generation_config", self.override_generation_config)
        for name, value in self.override_generation_config.items():
            _sampling_default(name, value)
        self._check_simulation()

    def _check_numbers(self) -> None:
        _integer("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        _integer("max_logprobs", self.max_logprobs, 0, 2**31 - 1)
        _integer("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, 2**31 - 1)
        _integer("max_long_partial_prefills", self.max_long_partial_prefills, 0, 2**31 - 1)
        _integer("tensor_parallel_size", self.tensor_parallel_size, 1, 2**31 - 1)
        _optional_integer("seed", self.seed, 0, 2**63 - 1)
        for name in ("max_model_len", "max_num_batched_tokens", "num_threads", "max_num_queued_reqs"):
            _optional_integer(name, getattr(self, name), 1, 2**31 - 1)
        _optional_integer("max_num_seqs", self.max_num_seqs, 1, MAX_NUM_SEQS)
        _optional_integer("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 2**62)
        _optional_integer("num_gpu_blocks_override", self.num_gpu_blocks_override, 2, 2**31 - 1)
        if not _is_number(self.gpu_memory_utilization) or not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "gpu_memory_utilization",
                f"must be in (0, 1], a number such as 0.92; got {self.gpu_memory_utilization!r:.80}",
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size", f"only 1 is supported yet; got {self.tensor_parallel_size}"
            )

    def _check_invariance(self, device: str) -> None:
        if self.batch_invariant and device == "cpu":
            raise ConfigError(
                "batch_invariant", "needs a GPU: the CPU's matrix products depend on the batch's size"
            )

    def _check_simulation(self) -> None:
        simulation = self.simulation
        if simulation is None:
            return
        if not isinstance(simulation, SimulationConfig):
            raise ConfigError("simulation", f"must be a SimulationConfig or None; got {simulation!r:.80}")
        if self.device != "simulated":
            raise ConfigError("simulation", "goes with device='simulated' only")
        for name in ("step_us", "token_us"):
            value = getattr(simulation, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"simulation.{name}", f"must be microseconds, 0 or more; got {value!r:.80}")
        _integer("simulation.num_blocks", simulation.num_blocks, 2, 2**31 - 1)
        _boolean("simulation.verify", simulation.verify)

    def _resolve_device(self) -> str:
        if self.device == "auto":
            return "cpu" if _problem_with_cuda() else "cuda"
        if self.device == "cuda" and (problem := _problem_with_cuda()):
            raise ConfigError("device", f"'cuda' cannot be used: {problem}; or choose device='cpu'")
        return self.device

    def _model_config(self, device: str) -> ModelConfig:
        if device == "simulated":
            return self._simulated_model()
        from tercet import model_source

        source = model_source.resolve_model(self.model, revision=self.revision)
        hf = {**source.config, **self.hf_overrides}
        architecture = model_source.architecture_of(hf)
        text = model_source.text_config_of(hf)
        derived = model_source.count_of(text, "max_position_embeddings", default=2048)
        vocab_size = model_source.count_of(text, "vocab_size")
        return ModelConfig(
            model=self.model or source.name,
            path=str(source.path),
            kind=source.kind,
            served_model_name=self._names(source.name),
            architecture=architecture,
            hf_config=json.dumps(hf),
            vocab_size=vocab_size,
            max_model_len=self._max_model_len(derived),
            dtype=_canonical_dtype(self.dtype),
            load_format=self.load_format,
            eos_token_ids=model_source.eos_token_ids_of(hf, source.generation_config, vocab_size),
            default_sampling=self._default_sampling(source.generation_config),
            fingerprint=source.fingerprint(),
            revision=self.revision,
        )

    def _simulated_model(self) -> ModelConfig:
        vocab_size = self.hf_overrides.get("vocab_size", 49152)
        _integer("hf_overrides['vocab_size']", vocab_size, 1, 2**31 - 1)
        eos_token_id = self.hf_overrides.get("eos_token_id", 0)
        _integer("hf_overrides['eos_token_id']", eos_token_id, 0, vocab_size - 1)
        return ModelConfig(
            model=self.model or "simulated",
            path="",
            kind="simulated",
            served_model_name=["simulated"] if self.served_model_name is None else self._names("simulated"),
            architecture="Simulated",
            hf_config=json.dumps(self.hf_overrides),
            vocab_size=vocab_size,
            max_model_len=self._max_model_len(2**31 - 1 if self.max_model_len else 8192),
            dtype="float32",
            load_format="dummy",
            eos_token_ids=[eos_token_id],
            default_sampling={},
        )

    def _names(self, default: str) -> list[str]:
        names = self.served_model_name or self.model or default
        return [names] if isinstance(names, str) else list(names)

    def _default_sampling(self, generation_config: Mapping[str, Any]) -> dict[str, float | int]:
        own = {} if self.generation_config == "vllm" else generation_config
        found = {name: own[name] for name in _SAMPLING if own.get(name) is not None}
        found.update(self.override_generation_config)
        for name, value in found.items():
            if problem := _problem_with_sampling(name, value):
                fix = "override the entry with override_generation_config, or give generation_config='vllm'"
                raise UnsupportedModelError(f"generation_config.json: {name} {problem}; {fix}")
        found = {name: value for name, value in found.items() if value is not None}
        if "max_new_tokens" in found:
            found["max_tokens"] = found.pop("max_new_tokens")
        return found

    def _max_model_len(self, derived: int) -> int:
        if self.max_model_len is None:
            return derived
        if self.max_model_len > derived:
            fix = f"choose at most {derived}, or raise max_position_embeddings through hf_overrides"
            raise ConfigError(
                "max_model_len", f"{self.max_model_len} exceeds what the model was made for; {fix}"
            )
        return self.max_model_len

    def _scheduler_config(self, model: ModelConfig, device: str) -> SchedulerConfig:
        max_num_seqs = self.max_num_seqs or DEFAULT_MAX_NUM_SEQS
        default_tokens = DEFAULT_CUDA_BATCHED_TOKENS if device == "cuda" else DEFAULT_CPU_BATCHED_TOKENS
        tokens = self.max_num_batched_tokens or max(default_tokens, max_num_seqs)
        if tokens < max_num_seqs:
            fix = f"raise it to at least max_num_seqs ({max_num_seqs}), or lower max_num_seqs"
            raise ConfigError(
                "max_num_batched_tokens", f"{tokens} cannot hold one token of every sequence; {fix}"
            )
        _check_table_size(max_num_seqs, model.max_model_len, self.block_size)
        return SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=tokens,
            max_model_len=model.max_model_len,
            policy=self.scheduling_policy,
            async_scheduling=self.async_scheduling,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            max_long_partial_prefills=self.max_long_partial_prefills,
            max_num_queued_reqs=self.max_num_queued_reqs or 65536,
            max_logprobs=min(self.max_logprobs, model.vocab_size),
            audit=self.audit,
        )


@dataclass(kw_only=True)
class AsyncEngineArgs(EngineArgs):
    """`EngineArgs` of an `AsyncLLM`, whose requests draw their seeds at random where they have none."""

    enable_log_requests: bool = False

    def _check(self) -> None:
        super()._check()
        _boolean("enable_log_requests", self.enable_log_requests)


def is_neutral(name: str, value: object) -> bool:
    """Whether `name` is an argument of vLLM's that Tercet does not have, at a value that changes nothing.

    Raises:
        ConfigError: it is such an argument, but asks for something that is not supported yet.
    """
    if name not in NEUTRAL:
        return False
    for allowed in NEUTRAL[name]:
        if isinstance(value, bool) == isinstance(allowed, bool) and value == allowed:
            return True
    choices = " or ".join(map(repr, NEUTRAL[name]))
    raise ConfigError(name, f"{value!r:.80} is not supported yet; leave it out, or give {choices}")


def default_num_threads() -> int:
    """CPU threads for the model: every core that this process may use."""
    return len(os.sched_getaffinity(0))


def _canonical_dtype(dtype: str) -> str:
    return {"half": "float16", "float": "float32"}.get(dtype, dtype)


def _problem_with_cuda() -> str:
    """Why a GPU cannot be used, with the fix; empty if nothing speaks against it. Does not load torch."""
    driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()  # dxg: WSL
    if not driver and not any(Path("/dev").glob("nvidia[0-9]*")):
        return "there is no NVIDIA driver or device on this machine (check that nvidia-smi works)"
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "torch is not installed; install a build of it for CUDA"
    if torch_version.endswith("+cpu"):
        return f"torch {torch_version} is a build for CPUs; install one for CUDA"
    return ""


def _check_table_size(max_num_seqs: int, max_model_len: int, block_size: int) -> None:
    """Refuse tables that the core could not allocate: int32 of each token and each block of every row."""
    row_bytes = 4 * (max_model_len + 1 + -(-max_model_len // block_size) + 1)
    if max_num_seqs * row_bytes <= MAX_TABLE_BYTES:
        return
    size = f"{max_num_seqs * row_bytes / 2**30:.1f} GiB, over the limit of {MAX_TABLE_BYTES >> 30} GiB"
    fit = MAX_TABLE_BYTES // row_bytes
    fix = f"lower max_num_seqs to at most {fit}, or lower max_model_len" if fit else "lower max_model_len"
    field = "max_num_seqs" if fit else "max_model_len"
    raise ConfigError(
        field,
        f"tables for max_num_seqs ({max_num_seqs}) × max_model_len ({max_model_len}) take {size}; {fix}",
    )


def _sampling_default(name: str, value: object) -> None:
    if name not in _SAMPLING:
        known = ", ".join(_SAMPLING)
        raise ConfigError("override_generation_config", f"has no entry {name!r:.80}; there are: {known}")
    if problem := _problem_with_sampling(name, value):
        raise ConfigError("override_generation_config", f"{name} {problem}")


def _problem_with_sampling(name: str, value: object) -> str:
    """What is wrong with a sampling default; empty if nothing is. None takes a model's default away."""
    kind, low, high = _SAMPLING[name]
    right_type = type(value) is int if kind is int else _is_number(value)
    if value is None or (right_type and low <= value <= high and (value or name not in _NOT_ZERO)):  # type: ignore[operator]
        return ""
    what = "a whole number" if kind is int else "a number"
    opening = "(" if name in _NOT_ZERO else "["
    limits = f"of {low:g} or more" if high >= 2**31 - 1 else f"in {opening}{low:g}, {high:g}]"
    return f"must be {what} {limits}; got {value!r:.80}"


def _served_names(value: object) -> None:
    names = value if isinstance(value, list) else [] if value is None else [value]
    if value == [] or not all(isinstance(name, str) for name in names):
        problem = "must be a name or a list of names; None is the model argument"
        raise ConfigError("served_model_name", f"{problem}; got {value!r:.80}")
    for name in names:
        _text("served_model_name", name)


def _json_object(name: str, value: object) -> None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(name, f"must be a dict with strings as keys; got {value!r:.80}")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(name, f"must hold only what JSON can express ({error})") from None


def _text(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise ConfigError(name, f"must be a string or None; got {value!r:.80} ({type(value).__name__})")
    if not value:
        raise ConfigError(name, "must not be empty; leave it out for the default")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ConfigError(name, f"must be text without NUL or lone surrogates; got {value!r:.80}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(name, f"must be one of {', '.join(allowed)}; got {value!r:.80}")


def _boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(name, f"must be True or False; got {value!r:.80}")


def _is_number(value: object) -> bool:
    """A finite int or float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _optional_integer(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(name, f"must be an integer in [{low}, {high}]; got {value!r:.80}")
