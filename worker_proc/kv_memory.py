"""How many KV blocks fit, and making them."""

from __future__ import annotations

import psutil
import torch
from torch import Tensor

from tercet.config import EngineConfig
from tercet.errors import ConfigError
from tercet.ops import AttentionMetadata
from tercet.worker_proc.device_batch import zeros_like_cpu_lazy
from tercet.worker_proc.models.decoder import CausalLM

CPU_DEFAULT_BYTES = (
    4 << 30
)  # as vLLM's CPU build; less where the machine or the configuration has less use for it
_GRAPH_SCRATCH_BYTES = 512 << 20


def cache_dtype(config: EngineConfig, model_dtype: torch.dtype) -> torch.dtype:
    """Of keys and values in the cache."""
    return model_dtype if config.cache.dtype == "auto" else torch.float8_e4m3fn


def cache_shape(config: EngineConfig, model: CausalLM, num_blocks: int) -> tuple[int, ...]:
    """Of one layer's cache."""
    return (2, num_blocks, config.cache.block_size, model.num_kv_heads, model.head_dim)


def allocate(config: EngineConfig, model: CausalLM, num_blocks: int, dtype: torch.dtype) -> list[Tensor]:
    """One cache per layer, all zero: masked slots are read, and must be finite."""
    device = next(model.parameters()).device
    shape = cache_shape(config, model, num_blocks)
    return [zeros_like_cpu_lazy(shape, dtype, device) for _ in range(model.num_layers)]


def block_bytes(config: EngineConfig, model: CausalLM, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    per_layer = 2 * config.cache.block_size * model.num_kv_heads * model.head_dim * dtype.itemsize
    return per_layer * model.num_layers


def count_blocks(config: EngineConfig, model: CausalLM, dtype: torch.dtype) -> int:
    """Blocks that the cache gets, the null block included.

    Raises:
        ConfigError: not even one block fits.
    """
    if config.cache.num_blocks_override is not None:
        return config.cache.num_blocks_override
    size = block_bytes(config, model, dtype)
    memory = config.cache.kv_cache_memory_bytes
    if memory is None:
        memory = _cuda_budget(config, model, dtype) if config.worker.device == "cuda" else _cpu_budget(config)
    # More than every row at its full length can never be used.
    scheduler = config.scheduler
    most = scheduler.max_num_seqs * -(-scheduler.max_model_len // config.cache.block_size) + 1
    num_blocks = min(memory // size, most)
    if num_blocks < 2:
        raise ConfigError(
            "kv_cache_memory_bytes", f"{memory} bytes do not hold a block of {size}; give at least {2 * size}"
        )
    return int(num_blocks)


def _cpu_budget(config: EngineConfig) -> int:
    available = psutil.virtual_memory().available
    return min(CPU_DEFAULT_BYTES, int(available * config.cache.gpu_memory_utilization / 2))


@torch.inference_mode()
def _cuda_budget(config: EngineConfig, model: CausalLM, dtype: torch.dtype) -> int:
    """What is left of the allowed share of the device after weights and a real peak of activations."""
    device = next(model.parameters()).device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    _run_largest_step(config, model, dtype)
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    elsewhere = total - free - reserved  # other processes, the context, libraries
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    graphs = 0 if config.worker.enforce_eager else _graph_bytes(config, model)
    return int(total * config.cache.gpu_memory_utilization) - elsewhere - peak - graphs


def _graph_bytes(config: EngineConfig, model: CausalLM) -> int:
    """What captured graphs keep beside that peak: the largest batch's logits, scratch and workspaces."""
    logits = config.scheduler.max_num_seqs * model.vocab_size * next(model.parameters()).dtype.itemsize
    return 2 * logits + _GRAPH_SCRATCH_BYTES


def _run_largest_step(config: EngineConfig, model: CausalLM, dtype: torch.dtype) -> None:
    """A step of max_num_batched_tokens prompt tokens, and logits for max_num_seqs rows."""
    device = next(model.parameters()).device
    size, scheduler = config.cache.block_size, config.scheduler
    length = min(scheduler.max_num_batched_tokens, scheduler.max_model_len)
    lengths = [length] * (scheduler.max_num_batched_tokens // length)
    num_tokens = sum(lengths)
    num_blocks = -(-length // size)
    caches = allocate(config, model, 2, dtype)
    starts = torch.arange(0, num_tokens + 1, length, dtype=torch.int32, device=device)
    meta = AttentionMetadata(
        num_decodes=0,
        block_table_BN=torch.zeros((len(lengths), num_blocks), dtype=torch.int32, device=device),
        seq_lens_B=torch.full((len(lengths),), length, dtype=torch.int32, device=device),
        query_start_B1=starts,
        slot_mapping_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        max_query_len=length,
        max_seq_len=length,
        counts=torch.tensor([0, len(lengths)], dtype=torch.int32, device=device),
        num_chunks=len(lengths),
        num_chunk_tokens=num_tokens,
    )
    zeros_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    hidden_TD = model.forward(zeros_T, zeros_T, caches, meta)
    logits = model.compute_logits(hidden_TD[: scheduler.max_num_seqs])
    logits.float().softmax(-1)  # stands for the sampler's scratch
