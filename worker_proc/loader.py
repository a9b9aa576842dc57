"""From a model's files to a model on its device.

Builds the architecture that the config names, gives each checkpoint tensor to the layer that it belongs to,
and checks that nothing is missing, left over or of the wrong shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch

from tercet.errors import ConfigError, UnsupportedModelError
from tercet.model_source import ModelSource
from tercet.worker_proc.layers import ParallelLMHead, Placement, RMSNorm, WeightedLayer
from tercet.worker_proc.models.config import ConfigReader
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.models.registry import model_class
from tercet.worker_proc.parallel import ParallelContext
from tercet.worker_proc.weights_gguf import iterate_gguf
from tercet.worker_proc.weights_safetensors import checkpoint_files, iterate_safetensors
from tercet.worker_proc.weights_source import NamedWeight, WeightsError

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Progress = Callable[[int, int], None]

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
# Stored by some old checkpoints, computed here.
_DERIVED = ("rotary_emb.inv_freq",)
_DUMMY_SEED = 0
_DUMMY_STD = 0.02


def load_model(
    source: ModelSource,
    *,
    device: str,
    dtype: str | torch.dtype = "auto",
    load_format: LoadFormat = "auto",
    parallel: ParallelContext | None = None,
    max_model_len: int | None = None,
    progress: Progress | None = None,
) -> CausalLM:
    """Build a model and load its weights.

    Args:
        source: where its files are, and its config.
        device: 'cpu', 'cuda' or 'cuda:N'.
        dtype: of weights and activations; 'auto' as `resolve_dtype` says.
        load_format: 'auto' goes by the source; 'dummy' reads no weights and draws them from a fixed seed.
        parallel: tensor-parallel rank; None for a single rank.
        max_model_len: longest sequence that will be served; None for the model's own limit.
        progress: called with (bytes loaded, bytes in all) after each tensor.

    Raises:
        UnsupportedModelError: an architecture or feature that is not implemented.
        WeightsError: a tensor is missing, unexpected, twice there, or has the wrong shape or type.
        ConfigError: an argument has a wrong value.
    """
    if "quantization_config" in source.config:
        problem = "quantized (quantization_config), which is supported for GGUF files only"
        raise UnsupportedModelError(f"{source.path}: {problem}")
    chosen_format = _resolve_format(load_format, source)
    model_type = model_class(source.config)
    place = Placement(
        torch.device(device), resolve_dtype(dtype, source, device), parallel or ParallelContext()
    )
    config = ConfigReader(source.config, max_model_len)
    model = model_type(config, place)
    if chosen_format == "dummy":
        fill_with_random_weights(model)
    elif chosen_format == "gguf":
        total = sum(tensor.nbytes for tensor in source.gguf.tensors.values())
        load_weights(model, iterate_gguf(source.gguf, config, place.dtype), total, progress)
    else:
        total = sum(file.stat().st_size for file in checkpoint_files(source.path))
        load_weights(model, iterate_safetensors(source.path), total, progress)
    return model.eval()


def resolve_dtype(dtype: str | torch.dtype, source: ModelSource, device: str) -> torch.dtype:
    """The dtype to compute in.

    'auto' is the config's dtype (float32 where it gives none). A GGUF file gives none: float32 on a CPU,
    bfloat16 elsewhere.

    Raises:
        ConfigError: not 'auto', float32, float16 or bfloat16.
    """
    if dtype == "auto":
        if source.kind == "gguf":
            return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        dtype = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")
    if isinstance(dtype, str):
        dtype = DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype not in DTYPES.values():
        raise ConfigError("dtype", f"must be 'auto' or one of {', '.join(DTYPES)}; got {dtype!r}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _resolve_format(load_format: str, source: ModelSource) -> str:
    own = "gguf" if source.kind == "gguf" else "safetensors"
    if load_format == "auto":
        return own
    if load_format not in (own, "dummy"):
        raise ConfigError(
            "load_format", f"must be 'auto', {own!r} or 'dummy' for this model; got {load_format!r}"
        )
    return load_format


class _Target:
    """A parameter and those of its parts that have not been loaded yet."""

    def __init__(self, layer: WeightedLayer, parameter: str) -> None:
        self.layer = layer
        self.parameter = parameter
        self.missing = set(layer.shards(parameter))

    def load(self, weight: NamedWeight, shard: str) -> None:
        filled = {shard} if shard else set(self.layer.shards(self.parameter))
        if not filled <= self.missing:
            raise WeightsError(f"tensor {weight.name!r} appears twice in the checkpoint")
        try:
            self.layer.load_weight(self.parameter, weight.read(), shard)
        except ValueError as error:
            raise WeightsError(
                f"tensor {weight.name!r} {error}; do config and weights belong together?"
            ) from None
        self.missing -= filled


def load_weights(
    model: CausalLM, weights: Iterable[NamedWeight], total_bytes: int, progress: Progress | None = None
) -> None:
    """Give each tensor to its layer.

    Raises:
        WeightsError: as `load_model`.
    """
    targets = _targets(model)
    loaded_bytes = 0
    for weight in weights:
        if not _is_derived(model, weight.name):
            name, shard = _locate(model, weight.name)
            if name not in targets:
                raise WeightsError(
                    f"tensor {weight.name!r} is not part of {type(model).__name__} with this config"
                )
            targets[name].load(weight, shard)
        loaded_bytes = min(loaded_bytes + weight.nbytes, total_bytes)
        if progress is not None:
            progress(loaded_bytes, total_bytes)
    if missing := [_describe(name, target) for name, target in targets.items() if target.missing]:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise WeightsError(f"the checkpoint lacks {', '.join(missing[:4])}{more}")
    if progress is not None:
        progress(total_bytes, total_bytes)  # headers and padding count as well


def _targets(model: CausalLM) -> dict[str, _Target]:
    """Full parameter name -> what is to be loaded there."""
    targets: dict[str, _Target] = {}
    for module_name, layer in model.named_modules():
        if not isinstance(layer, WeightedLayer):
            continue
        if model.spec.tie_word_embeddings and isinstance(layer, ParallelLMHead):
            continue
        for parameter, _ in layer.named_parameters(recurse=False):
            targets[f"{module_name}.{parameter}"] = _Target(layer, parameter)
    return targets


def _is_derived(model: CausalLM, name: str) -> bool:
    return name.endswith(_DERIVED) or (model.spec.tie_word_embeddings and name == "lm_head.weight")


def _locate(model: CausalLM, name: str) -> tuple[str, str]:
    """Checkpoint name -> (parameter name here, shard)."""
    match name.rsplit(".", 2):
        case [prefix, module, parameter] if module in model.packed_weights:
            packed, shard = model.packed_weights[module]
            return f"{prefix}.{packed}.{parameter}", shard
    return name, ""


def _describe(name: str, target: _Target) -> str:
    parts = sorted(target.missing - {""})
    return f"{name} ({', '.join(parts)})" if parts else name


@torch.no_grad()
def fill_with_random_weights(model: CausalLM) -> None:
    """Weights of the right size and a plausible scale, equal at every call; norms are neutral."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(_DUMMY_SEED)
    for layer in model.modules():
        if isinstance(layer, RMSNorm):
            layer.weight.fill_(1.0 - layer.weight_offset)
        elif isinstance(layer, WeightedLayer):
            for parameter in layer.parameters(recurse=False):
                parameter.normal_(0.0, _DUMMY_STD, generator=generator)
