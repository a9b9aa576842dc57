"""GGUF metadata rewritten as a Hugging Face config.json, so that one model definition serves both forms.

Knows the metadata keys of the architectures that Tercet runs; knows neither weights' values nor tokenizers.
Reads at most a few hundred numbers of tensor data: the RoPE factors, which GGUF keeps as tensors.

Source: ggml `docs/gguf.md`; key names as written by llama.cpp's converters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tercet.errors import UnsupportedModelError
from tercet.gguf import GGMLType, GGUFFile

Config = dict[str, object]


def config_from_gguf(file: GGUFFile) -> Config:
    """Config in config.json form.

    Raises:
        UnsupportedModelError: an architecture or feature that Tercet does not run, or a key missing.
    """
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _ARCHITECTURES:
        supported = ", ".join(_ARCHITECTURES)
        raise UnsupportedModelError(f"{file.path}: GGUF architecture {arch!r} is not one of: {supported}")
    keys = _Keys(file, arch)
    if keys.integer("expert_count", 0):
        raise UnsupportedModelError(f"{file.path}: mixture-of-experts GGUF models are not supported")
    if int(keys.number_of("split.count", 0)) > 1:
        raise UnsupportedModelError(
            f"{file.path}: the model is split over several files; join them with `llama-gguf-split --merge`"
        )
    config = _common(keys)
    config.update(_ARCHITECTURES[arch](keys, config))
    return config


def generation_config_from_gguf(file: GGUFFile) -> Config:
    """Token ids and recommended sampling values, in generation_config.json form."""
    meta = file.metadata
    ends = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    eos = list(dict.fromkeys(end for end in ends if isinstance(end, int)))
    generation: Config = {}
    if eos:
        generation["eos_token_id"] = eos if len(eos) > 1 else eos[0]
    for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if isinstance(value := meta.get(f"tokenizer.ggml.{name}_token_id"), int):
            generation[key] = value
    for name, key in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        if isinstance(number := meta.get(f"general.sampling.{name}"), (int, float)):
            generation[key] = number
    return generation


class _Keys:
    """Typed look-up of `<arch>.<key>` metadata, with errors that name the key."""

    def __init__(self, file: GGUFFile, arch: str) -> None:
        self.file = file
        self.arch = arch

    def number_of(self, key: str, default: float | None) -> float:
        value = self.file.metadata.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()  # one number per layer, all equal
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UnsupportedModelError(f"{self.file.path}: metadata {key} is {value!r}, expected one number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.number_of(f"{self.arch}.{key}", default))

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self.number_of(f"{self.arch}.{key}", default))

    def text(self, key: str, default: str) -> str:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if not isinstance(value, str):
            raise UnsupportedModelError(f"{self.file.path}: metadata {self.arch}.{key} is not a string")
        return value

    def has(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self.file.metadata

    def factors(self, tensor_name: str) -> list[float] | None:
        """A tensor of RoPE factors, or None where the file has none of this name."""
        tensor = self.file.tensors.get(tensor_name)
        if tensor is None:
            return None
        if tensor.type != GGMLType.F32:
            raise UnsupportedModelError(f"{self.file.path}: {tensor_name} is {tensor.type.name}, not F32")
        return [float(value) for value in tensor.data.view(np.dtype("<f4"))]


def _common(keys: _Keys) -> Config:
    file = keys.file
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UnsupportedModelError(f"{file.path}: no tensor token_embd.weight; not a language model?")
    num_heads = keys.integer("attention.head_count")
    hidden_size = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden_size // max(num_heads, 1))
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError(f"{file.path}: value heads wider or narrower than key heads")
    rotary_dim = keys.integer("rope.dimension_count", head_dim)
    config: Config = {
        "hidden_size": hidden_size,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": rotary_dim / max(head_dim, 1),
        "rope_scaling": _rope_scaling(keys),
        "vocab_size": embedding.shape[0],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config.update(generation_config_from_gguf(file))
    return config


def _rope_scaling(keys: _Keys) -> Config | None:
    max_length = keys.integer("context_length")
    original = keys.integer("rope.scaling.original_context_length", max_length)
    if factors := keys.factors("rope_freqs.weight"):
        # Llama 3 scaling, already worked out per frequency: what longrope does with equal factors.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": original,
        }
    short, long = keys.factors("rope_factors_short.weight"), keys.factors("rope_factors_long.weight")
    if short and long:
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": keys.number("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original,
        }
    kind = keys.text("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{keys.file.path}: RoPE scaling {kind!r} is not supported")
    scaling: Config = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama(keys: _Keys, config: Config) -> Config:
    if keys.has("attention.sliding_window"):
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": keys.integer("attention.sliding_window"),
        }
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _qwen2(keys: _Keys, config: Config) -> Config:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}


def _qwen3(keys: _Keys, config: Config) -> Config:
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}


def _gemma3(keys: _Keys, config: Config) -> Config:
    # The scalar is not in the file. It is the head size everywhere but in the 27B model (62 layers),
    # where it is hidden_size / num_heads (Gemma 3 report; llama.cpp decides in the same way).
    scalar = config["head_dim"]
    if config["num_hidden_layers"] == 62:
        scalar = keys.integer("embedding_length") // keys.integer("attention.head_count")
    softcap = keys.number("final_logit_softcapping", 0.0)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": keys.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "sliding_window": keys.integer("attention.sliding_window"),
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": softcap or None,
    }


def _phi3(keys: _Keys, config: Config) -> Config:
    window = keys.integer("attention.sliding_window", 0)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "sliding_window": window or None,
        "original_max_position_embeddings": keys.integer(
            "rope.scaling.original_context_length", keys.integer("context_length")
        ),
    }


_ARCHITECTURES: dict[str, Callable[[_Keys, Config], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
}
