"""GGUF models: SmolLM2's weights against transformers, and each architecture through a file of our making."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from tercet.errors import ModelNotFoundError
from tercet.model_source import ModelSource, resolve_model
from tercet.worker_proc.loader import load_model
from tercet.worker_proc.weights_dequantize import dequantize
from tests.worker_proc.models_harness import PagedRunner, reference_logits, save_tiny_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),
}
# What llama.cpp's converter calls the modules, written down from its tensor maps.
NAMES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    parts = name.split(".")
    if "layers" not in parts:
        return f"{'output_norm' if parts[-2] == 'norm' else NAMES[parts[-2]]}.{parts[-1]}"
    names = {**NAMES, **(GEMMA_NAMES if arch == "gemma3" else {})}
    return f"blk.{parts[parts.index('layers') + 1]}.{names[parts[-2]]}.{parts[-1]}"


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of Q and K in the order in which llama.cpp's converter writes them for the llama architecture."""
    split = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Any, arch: str, path: Path) -> None:
    """What llama.cpp's converter would write for a transformers model, in float32 and without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    seen = set()
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = parameter.numpy().copy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(
                values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            )
        if arch == "gemma3" and name.endswith("norm.weight"):
            values = values + 1
        seen.add(gguf_name(name, arch))
        writer.add_tensor(gguf_name(name, arch), values)
    assert len(seen) == len(model.state_dict()) - config.tie_word_embeddings
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("arch", CASES)
def test_logits_from_gguf_equal_those_of_transformers(arch: str, tmp_path: Path) -> None:
    name, changes = CASES[arch]
    config = getattr(transformers, name)(**{**SMALL, **changes})
    reference = save_tiny_checkpoint(config, tmp_path / "hf")
    write_gguf(reference, arch, tmp_path / "model.gguf")
    model = load_model(resolve_model(tmp_path / "model.gguf"), device="cpu")
    tokens = random.Random(0).choices(range(3, 96), k=21)
    runner = PagedRunner(model)
    got = torch.cat([runner.step({}, {"a": tokens[:-1]})["a"], runner.step({"a": tokens[-1]}, {})["a"]])
    torch.testing.assert_close(got, reference_logits(reference, tokens), atol=1e-4, rtol=0)


def test_llama3_rope_factors_are_taken_from_the_file(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = transformers.LlamaConfig(**{**SMALL, "rope_parameters": rope, "tie_word_embeddings": True})
    reference = save_tiny_checkpoint(config, tmp_path / "hf")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / reference.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.max() == pytest.approx(8.0)
    rope_free = transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True})
    same_weights = transformers.LlamaForCausalLM(rope_free)
    same_weights.load_state_dict(reference.state_dict())

    add_tensor, added = gguf.GGUFWriter.add_tensor, []

    def add_with_factors(self: Any, name: str, values: np.ndarray) -> None:
        if not added:
            added.append(name)
            add_tensor(self, "rope_freqs.weight", factors)
        add_tensor(self, name, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_tensor", add_with_factors)
        write_gguf(same_weights, "llama", tmp_path / "model.gguf")
    model = load_model(resolve_model(tmp_path / "model.gguf"), device="cpu")
    tokens = random.Random(0).choices(range(3, 96), k=40)
    got = PagedRunner(model).step({}, {"a": tokens})["a"]
    torch.testing.assert_close(got, reference_logits(reference, tokens), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def smollm2() -> ModelSource:
    try:
        return resolve_model()
    except ModelNotFoundError as error:
        pytest.skip(str(error))


def reference_smollm2(source: ModelSource) -> Any:
    """transformers' model with our dequantised weights; `transformers`' own reading takes half a minute."""
    config = transformers.LlamaConfig(**source.config)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    names = {gguf_name(name, "llama"): name for name in model.state_dict()}
    state = {}
    for name, tensor in source.gguf.tensors.items():
        weight = dequantize(tensor)
        if "attn_q" in name or "attn_k" in name:
            weight = weight.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)
        state[names[name]] = weight
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def test_smollm2_logits_equal_those_of_transformers(smollm2: ModelSource) -> None:
    model, reference = load_model(smollm2, device="cpu"), reference_smollm2(smollm2)
    lengths = {"a": 180, "b": 33, "c": 4}
    texts = {name: random.Random(name).choices(range(49_000), k=length) for name, length in lengths.items()}
    runner = PagedRunner(model, num_blocks=40, block_size=16)
    parts = [
        runner.step({}, {"a": texts["a"][:100], "b": texts["b"][:-1]}),
        runner.step({}, {"a": texts["a"][100:-1], "c": texts["c"][:-1]}),
        runner.step({name: tokens[-1] for name, tokens in texts.items()}, {}, num_frozen=1),
    ]
    for name, tokens in texts.items():
        got = torch.cat([part[name] for part in parts if name in part])
        # 1e-4 of the logits' size, which is some 20: thirty layers of float32 sums in another order
        expected = reference_logits(reference, tokens)
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-5)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))
