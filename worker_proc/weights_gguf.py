"""Checkpoints in GGUF files: names brought to the Hugging Face form, values dequantised and brought to the
order that the models here expect."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tercet.gguf import GGUFFile, GGUFTensor
from tercet.worker_proc.models.config import ConfigReader
from tercet.worker_proc.weights_dequantize import dequantize
from tercet.worker_proc.weights_source import NamedWeight, WeightsError

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# What differs from the above, by GGUF architecture.
_ARCHITECTURE_NAMES = {
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
# RoPE factors: part of the config, see tercet.gguf_config
_NOT_WEIGHTS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def iterate_gguf(file: GGUFFile, config: ConfigReader, dtype: torch.dtype) -> Iterator[NamedWeight]:
    """Every weight of the file, dequantised to dtype when read.

    Raises:
        WeightsError: a tensor whose name is not known for the architecture.
    """
    arch = str(file.metadata["general.architecture"])
    for tensor in file.tensors.values():
        if tensor.name not in _NOT_WEIGHTS:
            yield NamedWeight(
                hugging_face_name(tensor.name, arch),
                tensor.nbytes,
                partial(_read, tensor, arch, config, dtype),
            )


def hugging_face_name(name: str, arch: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        WeightsError: the name is not known.
    """
    match name.split("."):
        case [top, parameter] if top in _TOP_NAMES:
            return f"{_TOP_NAMES[top]}.{parameter}"
        case ["blk", layer, part, parameter]:
            module = _ARCHITECTURE_NAMES.get(arch, {}).get(part) or _BLOCK_NAMES.get(part)
            if module is not None:
                return f"model.layers.{layer}.{module}.{parameter}"
    raise WeightsError(f"GGUF tensor {name!r} is not one that architecture {arch!r} has")


def _read(tensor: GGUFTensor, arch: str, config: ConfigReader, dtype: torch.dtype) -> Tensor:
    weight = dequantize(tensor, dtype)
    part = tensor.name.split(".")[-2]
    if arch == "llama" and part in ("attn_q", "attn_k"):
        key = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
        return halves_from_pairs(weight, config.integer(key), tensor.name)
    if arch == "gemma3" and part.endswith("norm"):
        return weight - 1  # the file holds 1 + weight
    return weight


def halves_from_pairs(weight: Tensor, num_heads: int, name: str) -> Tensor:
    """Undo the row order in which llama.cpp keeps Q and K of the llama architecture.

    There RoPE rotates neighbours (2i, 2i + 1) of a head; here, as in Hugging Face checkpoints, it rotates
    (i, i + head_dim / 2).
    """
    rows = weight.shape[0]
    if rows % (2 * num_heads):
        raise WeightsError(f"GGUF tensor {name!r} has {rows} rows, which {num_heads} heads do not divide")
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
