"""Engine arguments: what is refused, by which name, and what becomes of the rest."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tercet import config, model_source
from tercet.config import NEUTRAL, AsyncEngineArgs, EngineArgs, SimulationConfig
from tercet.errors import ConfigError, UnsupportedModelError, ValidationError
from tercet.frontend.llm import LLM, _check_only, _engine_args
from tercet.worker_proc.models.registry import supported_architectures

ROOT = Path(__file__).resolve().parents[2]
BOOLS = [field for field, value in vars(AsyncEngineArgs()).items() if isinstance(value, bool)]
NO_JSON_OBJECTS: list[object] = [None, [], {1: 2}, {"a": {1, 2}}]
GOOD: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "eos_token_id": [2, 3],
}


def simulated(**fields: Any) -> config.EngineConfig:
    return AsyncEngineArgs(**{"device": "simulated", **fields}).create_engine_config()


def with_config(
    path: Path, entries: dict[str, object], generation: object = None, **fields: Any
) -> config.EngineConfig:
    """What becomes of a model directory with this config.json and generation_config.json."""
    (path / "config.json").write_text(json.dumps(entries))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return EngineArgs(model=str(path), device="cpu", **fields).create_engine_config()


def test_bools_are_all_there() -> None:
    assert set(BOOLS) == {*config._BOOLS, "enable_log_requests"}


@pytest.mark.parametrize("field", BOOLS)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_bool_must_be_a_bool(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: must be True or False; got"):
        simulated(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            (name, value)
            for name in ("model", "tokenizer", "revision")
            for value in (5, "", "\ud800", "a\0b")
        ),
        *((name, 5) for name in ("device", "dtype", "load_format", "scheduling_policy", "generation_config")),
        *(("gpu_memory_utilization", value) for value in ("0.5", None, math.nan, math.inf, True, 0, 1.1)),
        *(("hf_overrides", value) for value in NO_JSON_OBJECTS),
        *(("override_generation_config", value) for value in (None, [("top_k", 1)], {"top_q": 1})),
        *(("override_generation_config", {"temperature": value}) for value in ("1", True, math.nan, -1, 3)),
        *(("override_generation_config", {"top_k": value}) for value in (1.5, -2)),
        ("override_generation_config", {"top_p": 0}),
        ("override_generation_config", {"max_new_tokens": 0}),
        *(("served_model_name", value) for value in (5, [], "", [""], [5], ("a",))),
        *(("seed", value) for value in ("1", -1, 2**63, 1.0, True)),
        *(("max_num_seqs", value) for value in (0, 65537, 2**31 - 1, "8")),
        *(("block_size", value) for value in (None, 0, 513)),
        *((name, None) for name in ("max_logprobs", "long_prefill_token_threshold", "tensor_parallel_size")),
        *(("tensor_parallel_size", value) for value in (2, True, "1")),
        ("simulation", 5),
    ],
)
def test_wrong_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        simulated(**{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "value"),
    [("step_us", "1"), ("token_us", -1.0), ("step_us", math.nan), ("num_blocks", 1), ("verify", 1)],
)
def test_simulation_is_checked(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^simulation\.{name}: "):
        simulated(simulation=SimulationConfig(**{name: value}))


@pytest.mark.parametrize(
    "overrides",
    [
        *({"vocab_size": value} for value in (0, -5, "x", None)),
        *({"eos_token_id": value} for value in ("x", -1, [1])),
        {"vocab_size": 10, "eos_token_id": 10},
    ],
)
def test_simulated_model_is_checked(overrides: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"hf_overrides\['{list(overrides)[-1]}'\]"):
        simulated(hf_overrides=overrides)


def test_tables_too_large_are_refused_with_a_number_that_works() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seqs .*max_model_len .*8 GiB") as caught:
        simulated(max_num_seqs=65536, max_model_len=131072)
    fit = re.search(r"lower max_num_seqs to at most (\d+)", str(caught.value))
    assert fit is not None
    assert simulated(max_num_seqs=int(fit[1]), max_model_len=131072).scheduler.max_num_seqs == int(fit[1])
    with pytest.raises(ConfigError, match="GiB"):
        simulated(max_num_seqs=int(fit[1]) + 1, max_model_len=131072)
    with pytest.raises(ConfigError, match=r"max_model_len: .*; lower max_model_len"):
        simulated(max_num_seqs=1, max_model_len=2**31 - 1)


def test_served_model_name_is_what_was_given() -> None:
    assert simulated(served_model_name=["a", "b"]).model.served_model_name == ["a", "b"]
    assert simulated().model.served_model_name == ["simulated"]


# ---- a model's own files


def test_good_config_is_read(tmp_path: Path) -> None:
    entries = {**GOOD, "architectures": ["Unheard", "LlamaForCausalLM"]}
    generation = {"eos_token_id": 7, "top_k": 5, "temperature": 0.5, "do_sample": True, "max_new_tokens": 9}
    model = with_config(
        tmp_path, entries, generation, override_generation_config={"top_p": 0.5, "temperature": None}
    ).model
    assert (model.architecture, model.vocab_size, model.max_model_len) == ("LlamaForCausalLM", 100, 64)
    assert model.eos_token_ids == [2, 3, 7]
    assert model.default_sampling == {"top_k": 5, "top_p": 0.5, "max_tokens": 9}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("architectures", value) for value in (5, [], [5], None, "LlamaForCausalLM", ["Unheard"])),
        *(("vocab_size", value) for value in (None, "x", 0, 1.5, True)),
        *(("max_position_embeddings", value) for value in ("x", -1, 2.5)),
        *(("eos_token_id", value) for value in ("x", [1, "x"], -1, 100, True)),
        ("text_config", 5),
    ],
)
def test_broken_config_is_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"config\.json: {key} "):
        with_config(tmp_path, {**GOOD, key: value})


def test_empty_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json: architectures"):
        with_config(tmp_path, {})


def test_config_can_be_mended_by_overrides(tmp_path: Path) -> None:
    fixed = with_config(tmp_path, {**GOOD, "vocab_size": None}, hf_overrides={"vocab_size": 50})
    assert fixed.model.vocab_size == 50


def test_broken_generation_config_is_named_and_can_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json: top_p must be a number"):
        with_config(tmp_path, GOOD, {"top_p": "x"})
    assert with_config(tmp_path, GOOD, {"top_p": "x"}, generation_config="vllm").model.default_sampling == {}
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json: eos_token_id"):
        with_config(tmp_path, GOOD, {"eos_token_id": "x"})


def test_supported_architectures_are_the_workers() -> None:
    assert supported_architectures() == model_source.SUPPORTED_ARCHITECTURES


# ---- the device


def test_cuda_needs_a_device_and_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    present = False
    monkeypatch.setattr(Path, "exists", lambda path: present)
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(()))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.0+cpu")
    with pytest.raises(ConfigError, match=r"^device: 'cuda' cannot be used: there is no NVIDIA"):
        EngineArgs(device="cuda")._resolve_device()
    present = True
    with pytest.raises(
        ConfigError, match=r"^device: 'cuda' cannot be used: torch 2\.9\.0\+cpu is a build for CPUs"
    ):
        EngineArgs(device="cuda")._resolve_device()
    assert EngineArgs()._resolve_device() == "cpu"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.0+cu130")
    assert EngineArgs(device="cuda")._resolve_device() == EngineArgs()._resolve_device() == "cuda"


# ---- arguments of vLLM's that are only known by name


def test_neutral_values_pass_and_others_do_not() -> None:
    for name, allowed in NEUTRAL.items():
        for value in allowed:
            assert _engine_args(None, {name: value, "seed": 3}) == EngineArgs(seed=3)
        with pytest.raises(ConfigError, match=f"^{name}: 'other' is not supported yet; leave it out"):
            _engine_args(None, {name: "other"})
    assert not set(NEUTRAL) & set(vars(AsyncEngineArgs()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_chunked_prefill", False),
        ("pipeline_parallel_size", 2),
        ("enable_lora", True),
        ("swap_space", 8),
    ],
)
def test_llm_refuses_what_is_not_neutral(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: {value} is not supported yet"):
        LLM(device="simulated", **{name: value})


def test_docs_list_the_neutral_values() -> None:
    text = (ROOT / "docs/engine_args.md").read_text()
    documented = dict(re.findall(r"^- `(\w+)`: (.+)$", text, re.MULTILINE))
    assert documented == {name: ", ".join(map(repr, values)) for name, values in NEUTRAL.items()}


def test_llm_calls_accept_neutral_values_only() -> None:
    with LLM(device="simulated") as llm:
        assert llm.generate([1], use_tqdm=False, lora_request=None)
        wrong: Any = object()
        with pytest.raises(ValidationError, match=r"^lora_request: .* is not supported yet"):
            llm.generate([1], lora_request=wrong)
        with pytest.raises(ValidationError, match=r"^lora_request: "):
            llm.chat([{"role": "user", "content": "x"}], None, False, wrong)
        with pytest.raises(ValidationError, match=r"^chat_template_content_format: "):
            llm.chat([], chat_template_content_format="openai")  # type: ignore[arg-type]
    _check_only("chat_template_content_format", "auto", "auto")
