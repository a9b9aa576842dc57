"""Configuration: what a user passes (`EngineArgs`) and what the processes are handed (`EngineConfig`).

`EngineArgs` has vLLM's names and defaults where they apply. `EngineArgs.create_engine_config()` resolves every
default once, in the process that starts the engine; the result is a tree of frozen structs that crosses to the
core and the workers as MessagePack. No torch here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from tercet.errors import ConfigError

DEVICES = ("auto", "cpu", "cuda", "simulated")
DTYPES = ("auto", "float32", "bfloat16", "float16", "half", "float")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
POLICIES = ("fcfs", "priority")

DEFAULT_MAX_NUM_SEQS = 256
DEFAULT_CPU_BATCHED_TOKENS = 2048
DEFAULT_CUDA_BATCHED_TOKENS = 8192
MAX_BLOCK_SIZE = 512


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
    enforce_eager: bool = False
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
    block_size: int = 16
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
    simulation: SimulationConfig | None = None  # for device='simulated'
    audit: bool = False

    def create_engine_config(self) -> EngineConfig:
        """Check every argument and resolve every default.

        Raises:
            ConfigError: an argument has a value that cannot work; names it and the fix.
            ModelNotFoundError: no model files where `model` points.
        """
        self._check()
        device = self._resolve_device()
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
            ),
            scheduler=scheduler,
            worker=WorkerConfig(
                device=device,
                num_threads=self.num_threads or default_num_threads(),
                enforce_eager=self.enforce_eager,
                simulation=self.simulation or SimulationConfig(),
            ),
            frontend=FrontendConfig(
                tokenizer=self.tokenizer or "", skip_tokenizer_init=self.skip_tokenizer_init
            ),
        )

    def _check(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("scheduling_policy", self.scheduling_policy, POLICIES)
        _one_of("generation_config", self.generation_config, ("auto", "vllm"))
        _between("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        _between("seed", self.seed, 0, 2**63 - 1)
        _between("max_logprobs", self.max_logprobs, 0, 2**31 - 1)
        _between("long_prefill_token_threshold", self.long_prefill_token_threshold, 0, 2**31 - 1)
        _between("max_long_partial_prefills", self.max_long_partial_prefills, 0, 2**31 - 1)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_threads",
            "max_num_queued_reqs",
        ):
            _between(name, getattr(self, name), 1, 2**31 - 1)
        _between("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, 2**62)
        _between("num_gpu_blocks_override", self.num_gpu_blocks_override, 2, 2**31 - 1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "gpu_memory_utilization", f"must be in (0, 1]; got {self.gpu_memory_utilization}"
            )
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size", f"only 1 is supported yet; got {self.tensor_parallel_size}"
            )
        if self.simulation is not None and self.device != "simulated":
            raise ConfigError("simulation", "goes with device='simulated' only")

    def _resolve_device(self) -> str:
        if self.device != "auto":
            return self.device
        return (
            "cuda" if Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists() else "cpu"
        )

    def _model_config(self, device: str) -> ModelConfig:
        if device == "simulated":
            return self._simulated_model()
        from tercet.model_source import resolve_model

        source = resolve_model(self.model, revision=self.revision)
        hf = {**source.config, **self.hf_overrides}
        text = hf.get("text_config") or hf
        derived = int(text.get("max_position_embeddings") or 2048)
        generation = {} if self.generation_config == "vllm" else dict(source.generation_config)
        generation.update(self.override_generation_config)
        name = self.served_model_name or self.model or source.name
        return ModelConfig(
            model=self.model or source.name,
            path=str(source.path),
            kind=source.kind,
            served_model_name=[name] if isinstance(name, str) else list(name),
            architecture=(hf.get("architectures") or ["unknown"])[0],
            hf_config=json.dumps(hf),
            vocab_size=int(text["vocab_size"]),
            max_model_len=self._max_model_len(derived),
            dtype=_canonical_dtype(self.dtype),
            load_format=self.load_format,
            eos_token_ids=_eos_token_ids(hf, source.generation_config),
            default_sampling=_default_sampling(generation),
            fingerprint=source.fingerprint(),
            revision=self.revision,
        )

    def _simulated_model(self) -> ModelConfig:
        vocab_size = int(self.hf_overrides.get("vocab_size", 49152))
        return ModelConfig(
            model=self.model or "simulated",
            path="",
            kind="simulated",
            served_model_name=["simulated"],
            architecture="Simulated",
            hf_config=json.dumps(self.hf_overrides),
            vocab_size=vocab_size,
            max_model_len=self._max_model_len(2**31 - 1 if self.max_model_len else 8192),
            dtype="float32",
            load_format="dummy",
            eos_token_ids=[int(self.hf_overrides.get("eos_token_id", 0))],
            default_sampling={},
        )

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


def default_num_threads() -> int:
    """CPU threads for the model: every core that this process may use."""
    return len(os.sched_getaffinity(0))


def _canonical_dtype(dtype: str) -> str:
    return {"half": "float16", "float": "float32"}.get(dtype, dtype)


def _eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any]) -> list[int]:
    ids: list[int] = []
    for source in (config.get("eos_token_id"), generation_config.get("eos_token_id")):
        for token_id in source if isinstance(source, list) else [source]:
            if token_id is not None and int(token_id) not in ids:
                ids.append(int(token_id))
    return ids


def _default_sampling(generation: dict[str, Any]) -> dict[str, float | int]:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
    found = {name: generation[name] for name in names if generation.get(name) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(name, f"must be one of {', '.join(allowed)}; got {value!r}")


def _between(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high
    ):
        raise ConfigError(name, f"must be an integer in [{low}, {high}]; got {value!r}")
