"""Loading checkpoints: formats, dtypes, and what is said when weights and config do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tercet.errors import ConfigError, UnsupportedModelError
from tercet.gguf import BLOCK_SIZES, GGMLType, GGUFTensor
from tercet.model_source import ModelSource, resolve_model
from tercet.worker_proc.loader import load_model
from tercet.worker_proc.weights_dequantize import dequantize, supported_types
from tercet.worker_proc.weights_source import WeightsError
from tests.worker_proc.models_harness import save_tiny_checkpoint

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_tiny_checkpoint(transformers.LlamaConfig(**CONFIG), tmp_path)
    return tmp_path


def rewrite(checkpoint: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a checkpoint."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(checkpoint / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, checkpoint / "model.safetensors")


def load(checkpoint: Path, **arguments: Any) -> Any:
    return load_model(resolve_model(checkpoint), device="cpu", **arguments)


def test_shards_with_an_index_equal_one_file(checkpoint: Path, tmp_path: Path) -> None:
    whole = load(checkpoint).state_dict()
    transformers.LlamaForCausalLM.from_pretrained(checkpoint).save_pretrained(
        tmp_path / "sharded", max_shard_size="20KB"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded = load(tmp_path / "sharded").state_dict()
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_dtype_is_that_of_the_config(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_checkpoint(transformers.LlamaConfig(**CONFIG), tmp_path, dtype=dtype)
    source = resolve_model(tmp_path)
    model = load_model(source, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(model.lm_head.weight, load_file(tmp_path / "model.safetensors")["lm_head.weight"])
    for explicit in ("float32", torch.float32):
        wide = load_model(source, device="cpu", dtype=explicit)
        assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())
    with pytest.raises(ConfigError, match="dtype"):
        load_model(source, device="cpu", dtype="int8")


def test_progress_counts_bytes_up_to_the_total(checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    load(checkpoint, progress=lambda done, total: calls.append((done, total)))
    size = (checkpoint / "model.safetensors").stat().st_size
    assert len(calls) > 10
    assert {total for _, total in calls} == {size}
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1] == (size, size)
    assert calls[len(calls) // 2][0] < size


def test_missing_tensors_are_named(checkpoint: Path) -> None:
    rewrite(checkpoint, **{Q_PROJ: None, "model.norm.weight": None})
    with pytest.raises(
        WeightsError, match=r"layers\.0\.self_attn\.qkv_proj\.weight \(q\), model\.norm\.weight"
    ):
        load(checkpoint)


def test_unexpected_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, **{"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)})
    with pytest.raises(WeightsError, match=r"layers\.2\.mlp\.up_proj.*not part of LlamaForCausalLM"):
        load(checkpoint)


@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_tensor_of_the_wrong_shape_is_named(name: str, checkpoint: Path) -> None:
    rewrite(checkpoint, **{name: torch.zeros(7, 32)})
    with pytest.raises(WeightsError, match=rf"{name}.*shape \[7, 32\]"):
        load(checkpoint)


def test_tensor_of_integers_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, **{Q_PROJ: torch.zeros(32, 32, dtype=torch.int8)})
    with pytest.raises(WeightsError, match=rf"{Q_PROJ}.*int8"):
        load(checkpoint)


def test_tensors_that_follow_from_others_are_passed_over(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**CONFIG, tie_word_embeddings=True)
    save_tiny_checkpoint(config, tmp_path)
    expected = load(tmp_path).state_dict()
    rewrite(
        tmp_path,
        **{
            "lm_head.weight": load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        },
    )
    got = load(tmp_path).state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_corrupt_files_are_typed_errors(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = weights.read_bytes()
    for bad in (b"", content[:100], content[:-8], b"\xff" * 64):
        weights.write_bytes(bad)
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            load(checkpoint)


def test_no_pickle_is_read(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickle"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a valid index"),
        ("[]", "not a valid index"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "missing"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "plain file name"),
        ('{"weight_map": {"a": 3}}', "plain file name"),
    ],
)
def test_wrong_index_is_a_typed_error(index: str, message: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        load(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"hidden_act": "tanhshrink"}, "hidden_act"),
        ({"attention_bias": 3}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"architectures": ["Unheard"]}, "Unheard"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": 7}, "rope_parameters"),
    ],
)
def test_wrong_config_is_a_typed_error_that_names_the_key(
    changes: dict[str, object], message: str, checkpoint: Path
) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        load(checkpoint)


def test_dummy_weights_need_no_files_and_are_equal_each_time(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    first, second = (load(checkpoint, load_format="dummy").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.norm.weight"].eq(1).all()
    assert 0.01 < first["lm_head.weight"].std() < 0.03


def test_load_format_must_fit_the_source(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="load_format"):
        load(checkpoint, load_format="gguf")
    source = replace(resolve_model(checkpoint), kind="gguf", path=Path("x.gguf"))
    assert isinstance(source, ModelSource)
    with pytest.raises(ConfigError, match="load_format"):
        load_model(source, device="cpu", load_format="safetensors")


@pytest.mark.parametrize("name", supported_types())
def test_dequantised_values_equal_those_of_the_public_package(name: str) -> None:
    kind = GGMLType[name]
    elements, size = BLOCK_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks_per_row = 3 if elements > 1 else 30
    raw = rng.integers(0, 256, (50, blocks_per_row * size), dtype=np.uint8)
    tensor = GGUFTensor("x", (50, blocks_per_row * elements), kind, raw.reshape(-1))
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(int(kind)))
    got = dequantize(tensor).numpy()
    assert got.shape == expected.shape
    finite = np.isfinite(expected)
    assert finite.mean() > 0.5
    np.testing.assert_array_equal(got[finite], expected[finite])
    assert not np.isfinite(got[~finite]).any()


def test_storage_type_that_is_not_implemented_is_named() -> None:
    tensor = GGUFTensor("blk.0.x", (256,), GGMLType.IQ2_XS, np.zeros(74, np.uint8))
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.x.*IQ2_XS.*Q4_K"):
        dequantize(tensor)
