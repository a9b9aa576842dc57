"""Finding a model, and what a GGUF file's metadata becomes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tercet import model_source
from tercet.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from tercet.model_source import DEFAULT_MODEL_FILE, DEFAULT_MODEL_NAME, resolve_model


def write_gguf(path: Path, arch: str = "llama", **values: object) -> Path:
    """A file with the metadata of a model of two layers and an embedding, and no further weights."""
    keys: dict[str, object] = {
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": 64,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.eos_token_id": 2,
        **{key.format(arch=arch): value for key, value in values.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in keys.items():
        match value:
            case str():
                writer.add_string(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case list():
                writer.add_array(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((48, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_directory(path: Path, **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    return path


def test_directory_gives_its_configs(tmp_path: Path) -> None:
    write_directory(tmp_path, hidden_size=64)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    source = resolve_model(str(tmp_path))
    assert (source.kind, source.path, source.name) == ("hf", tmp_path, str(tmp_path))
    assert source.config["hidden_size"] == 64
    assert source.generation_config == {"temperature": 0.6}
    with pytest.raises(TypeError):
        _ = source.gguf


def test_gguf_metadata_becomes_a_config(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        **{"{arch}.rope.freq_base": 5e5, "tokenizer.ggml.eot_token_id": 9, "general.sampling.temp": 0.75},
    )
    source = resolve_model(path)
    assert source.kind == "gguf"
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 48,
        "max_position_embeddings": 512,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "eos_token_id": [2, 9],
    }
    assert {key: source.config[key] for key in expected} == expected
    assert source.config["rms_norm_eps"] == pytest.approx(1e-5)
    assert source.generation_config == {"eos_token_id": [2, 9], "temperature": 0.75}


def test_gguf_features_reach_the_config(tmp_path: Path) -> None:
    yarn = {
        "{arch}.rope.scaling.type": "yarn",
        "{arch}.rope.scaling.factor": 4.0,
        "{arch}.rope.scaling.original_context_length": 128,
    }
    config = resolve_model(write_gguf(tmp_path / "yarn.gguf", "qwen2", **yarn)).config
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    window = {"{arch}.attention.sliding_window": 32, "{arch}.attention.key_length": 32}
    window["{arch}.attention.value_length"] = 32
    config = resolve_model(write_gguf(tmp_path / "gemma.gguf", "gemma3", **window)).config
    assert (config["sliding_window"], config["head_dim"], config["query_pre_attn_scalar"]) == (32, 32, 32)
    config = resolve_model(
        write_gguf(tmp_path / "mistral.gguf", **{"{arch}.attention.sliding_window": 32})
    ).config
    assert config["architectures"] == ["MistralForCausalLM"]
    per_layer = {"{arch}.attention.head_count_kv": [2, 2]}
    assert resolve_model(write_gguf(tmp_path / "l.gguf", **per_layer)).config["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("arch", "values", "message"),
    [
        ("rwkv7", {}, "rwkv7.*llama"),
        ("llama", {"{arch}.expert_count": 8}, "mixture"),
        ("llama", {"split.count": 3}, "gguf-split"),
        ("llama", {"{arch}.rope.scaling.type": "sideways"}, "sideways"),
        ("llama", {"{arch}.attention.head_count_kv": [2, 4]}, "head_count_kv"),
        ("llama", {"{arch}.block_count": "two"}, "block_count"),
        ("llama", {"{arch}.attention.value_length": 8}, "value heads"),
    ],
)
def test_gguf_that_cannot_be_run_says_why(
    arch: str, values: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", arch, **values)
    with pytest.raises(UnsupportedModelError, match=message):
        resolve_model(path)


def test_without_a_model_the_cache_comes_first_then_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(model_source, "DEFAULT_MODEL_PACKAGE", "a_model_package")
    with pytest.raises(ModelNotFoundError, match="tercet models fetch"):
        resolve_model()
    packaged = write_gguf(tmp_path / "site" / "a_model_package" / DEFAULT_MODEL_FILE)
    (packaged.parent / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert resolve_model().path == packaged
    cached = write_gguf(tmp_path / "cache" / "models" / DEFAULT_MODEL_FILE)
    assert (resolve_model().path, resolve_model().name) == (cached, DEFAULT_MODEL_NAME)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere.gguf", "~/nowhere"])
def test_missing_path_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no such file"):
        resolve_model(name)


def test_hub_id_without_a_network_gives_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"org/name.*network.*local path"):
        resolve_model("org/name-that-is-not-cached")


@pytest.mark.parametrize("name", ["no such model", "a/b/c", "", "-x", "org/.."])
def test_neither_path_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises((ConfigError, ModelNotFoundError)):
        resolve_model(name)


def test_wrong_directories_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        resolve_model(tmp_path)
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelNotFoundError, match=r"m\.gguf"):
        resolve_model(tmp_path)
    for content, message in (("{", "JSON"), ("[1]", "object"), ("[" * 100_000, "JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UnsupportedModelError, match=message):
            resolve_model(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match="gguf"):
        resolve_model(tmp_path / "weights.bin")


def test_fingerprint_follows_config_and_weights(tmp_path: Path) -> None:
    first, second = write_directory(tmp_path / "a"), write_directory(tmp_path / "b")
    weights = bytes(1_000_000)
    for folder in (first, second):
        (folder / "model.safetensors").write_bytes(weights)
    digest = resolve_model(first).fingerprint()
    assert resolve_model(second).fingerprint() == digest
    (second / "model.safetensors").write_bytes(weights[:-1] + b"x")
    assert resolve_model(second).fingerprint() != digest
    (second / "model.safetensors").write_bytes(weights)
    write_directory(second, hidden_size=8)
    assert resolve_model(second).fingerprint() != digest


def test_no_heavy_module_is_imported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    check = (
        "import sys; from tercet.model_source import resolve_model; resolve_model(sys.argv[1]); "
        "sys.exit(bool({'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check, str(path)], check=False).returncode == 0
