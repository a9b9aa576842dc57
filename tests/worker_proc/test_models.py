"""Each architecture against transformers, on small random checkpoints in float32."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tercet.errors import UnsupportedModelError
from tercet.model_source import resolve_model
from tercet.worker_proc.loader import load_model
from tercet.worker_proc.models.config import ConfigReader
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.models.registry import model_class, supported_architectures
from tercet.worker_proc.rope import RotaryEmbedding
from tests.worker_proc.models_harness import PagedRunner, reference_logits, save_tiny_checkpoint

TOLERANCE = 1e-4
VOCAB_SIZE = 160
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# 10 rotated elements of 20: five factors
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0],
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 128,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biases-tied": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 24},
    ),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7, "head_dim": 16}),
    "mistral-no-window": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 4,
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3-scaled-rope": (
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "phi3-window-partial": (
        "Phi3Config",
        {
            "hidden_size": 80,
            "sliding_window": 10,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        {"hidden_size": 80, "rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    ),
}


def make_pair(case: str, path: Path, max_model_len: int | None = None) -> tuple[CausalLM, Any]:
    """Our model and transformers' own, with the same weights."""
    name, changes = CASES[case]
    config = getattr(transformers, name)(**{**SMALL, **changes})
    reference = save_tiny_checkpoint(config, path)
    return load_model(resolve_model(path), device="cpu", max_model_len=max_model_len), reference


def random_tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB_SIZE), k=count)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    # Short factors of longrope: the length stays below the original one.
    model, reference = make_pair(case, tmp_path, max_model_len=128)
    texts = {
        name: random_tokens(length, i) for i, (name, length) in enumerate([("a", 31), ("b", 3), ("c", 18)])
    }
    expected = {name: reference_logits(reference, tokens) for name, tokens in texts.items()}
    got: dict[str, list[torch.Tensor]] = {name: [] for name in texts}
    runner = PagedRunner(model)

    def step(decodes: dict[str, int], chunks: dict[str, list[int]], num_frozen: int = 0) -> None:
        for name, logits in runner.step(decodes, chunks, num_frozen).items():
            got[name].append(logits)

    a, b, c = texts.values()
    step({}, {"a": a[:13], "b": b[:2]})  # prefill of two
    step({"b": b[2]}, {"a": a[13:24], "c": c[:1]}, num_frozen=2)  # a chunk, a decode, a prompt of one token
    step({}, {"c": c[1:15]})
    for i in range(3):  # decodes of unequal length, beside frozen rows
        step({"a": a[24 + i], "c": c[15 + i]}, {}, num_frozen=i)
    for token in a[27:]:
        step({"a": token}, {})
    for name in texts:
        torch.testing.assert_close(torch.cat(got[name]), expected[name], atol=TOLERANCE, rtol=0)
        assert expected[name].std() > 0.1  # the comparison says something


def test_longrope_uses_the_long_factors_when_long_sequences_are_served(tmp_path: Path) -> None:
    model, reference = make_pair("phi3-longrope", tmp_path)
    tokens = random_tokens(150, 0)
    got = PagedRunner(model).step({}, {"a": tokens})["a"]
    torch.testing.assert_close(got, reference_logits(reference, tokens), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["llama3-rope", "phi3-longrope", "gemma3-scaled-rope"])
def test_configs_of_older_transformers_mean_the_same(case: str) -> None:
    name, changes = CASES[case]
    config = getattr(transformers, name)(**{**SMALL, **changes}).to_dict()
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    scaling = config["rope_parameters"]
    if "full_attention" in scaling:
        old["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        scaling = scaling["full_attention"]
    old["rope_theta"] = scaling["rope_theta"]
    old["rope_scaling"] = {
        key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type")
    }
    old["rope_scaling"]["type"] = scaling["rope_type"]

    cls = model_class({"architectures": [architecture_of(name)]})
    new_spec, old_spec = (
        cls.read_spec(ConfigReader(c).with_defaults(cls.config_defaults)) for c in (config, old)
    )
    assert new_spec.rope.keys() == old_spec.rope.keys()
    for kind in new_spec.rope:
        of_new, of_old = (RotaryEmbedding(s.rope[kind], torch.device("cpu")) for s in (new_spec, old_spec))
        torch.testing.assert_close(of_new.inv_freq, of_old.inv_freq)
        assert of_new.attention_factor == of_old.attention_factor


def architecture_of(config_name: str) -> str:
    return config_name.removesuffix("Config").removesuffix("Text") + "ForCausalLM"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(dtype: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**SMALL, "initializer_range": 0.05})
    reference = save_tiny_checkpoint(config, tmp_path)
    model = load_model(resolve_model(tmp_path), device="cpu", dtype=dtype)
    tokens = random_tokens(12, 0)
    runner = PagedRunner(model)
    got = torch.cat(
        [runner.step({}, {"a": tokens[:9]})["a"]] + [runner.step({"a": t}, {})["a"] for t in tokens[9:]]
    )
    expected = reference_logits(reference, tokens)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_poisoned_row_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    model, _ = make_pair("llama", tmp_path)
    tokens = random_tokens(9, 0)
    clean = PagedRunner(model, seed=1)
    clean.step({}, {"a": tokens[:5]})
    expected = clean.step({"a": tokens[5]}, {})["a"]
    model.model.embed_tokens.weight[3] = float("nan")  # only the other sequence has token 3
    runner = PagedRunner(model, seed=1)
    runner.step({}, {"a": [t if t != 3 else 4 for t in tokens[:5]], "bad": [3, 3, 3]})
    runner.step({"bad": 3}, {})
    got = runner.step({"bad": 3, "a": tokens[5]}, {}, num_frozen=2)
    assert got["bad"].isnan().all()
    torch.testing.assert_close(got["a"], expected, atol=TOLERANCE, rtol=0)


def test_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM") as caught:
        model_class({"architectures": ["MambaForCausalLM"]})
    assert all(name in str(caught.value) for name in supported_architectures())
    with pytest.raises(UnsupportedModelError):
        model_class({})


def test_every_architecture_of_the_registry_is_compared() -> None:
    assert {architecture_of(name) for name, _ in CASES.values()} == set(supported_architectures())


def test_no_transformers_model_code_is_imported_by_the_worker() -> None:
    check = (
        "import sys, tercet.worker_proc.loader, tercet.worker_proc.models.gemma3; "
        "sys.exit(any(name.split('.')[0] == 'transformers' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_cuda_gives_the_same_and_never_waits(case: str, tmp_path: Path) -> None:
    _, reference = make_pair(case, tmp_path)
    model = load_model(resolve_model(tmp_path), device="cuda", max_model_len=128)
    tokens = random_tokens(24, 0)
    expected = reference_logits(reference, tokens)
    runner = PagedRunner(model)
    got = [
        runner.step({}, {"a": tokens[:15], "b": tokens[:3]})["a"],
        runner.step({}, {"a": tokens[15:22]})["a"],
    ]
    got += [runner.step({"a": token, "b": 5}, {}, num_frozen=2)["a"] for token in tokens[22:]]
    torch.testing.assert_close(torch.cat(got).cpu(), expected, atol=5e-4, rtol=0)

    runner.grow("a", 1)
    rows = {"a": [5], "b": [6, 7, 8]}
    runner.grow("b", 3)
    meta, positions = runner.metadata(rows, num_decodes=1)
    token_ids = torch.tensor([5, 6, 7, 8], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.compute_logits(model(token_ids, positions, runner.kv_caches, meta))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["llama", "mistral-window", "gemma3"])
def test_decode_can_be_captured_as_a_cuda_graph(case: str, tmp_path: Path) -> None:
    make_pair(case, tmp_path)
    model = load_model(resolve_model(tmp_path), device="cuda")
    runner = PagedRunner(model)
    prompts = {"a": random_tokens(20, 0), "b": random_tokens(9, 1)}
    runner.step({}, prompts)
    for name in prompts:
        runner.grow(name, 1)
    rows = {"a": [5], "b": [6]}
    token_ids = torch.tensor([5, 6], device="cuda")

    def forward() -> torch.Tensor:
        meta, positions = metadata
        fresh = replace(meta, memo={})
        with torch.inference_mode():
            return model.compute_logits(model(token_ids, positions, runner.kv_caches, fresh))

    metadata = runner.metadata(rows, num_decodes=2)
    expected = forward()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    token_ids.copy_(torch.tensor([9, 9]))
    graph.replay()
    assert not torch.allclose(captured, expected, atol=1e-3)
    token_ids.copy_(torch.tensor([5, 6]))
    graph.replay()
    torch.testing.assert_close(captured, expected, atol=1e-5, rtol=0)
