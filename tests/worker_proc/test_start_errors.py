"""A model that cannot be loaded: one line that names the file or entry, and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.tercet.cli_tools import run
from tests.worker_proc.models_harness import save_tiny_checkpoint

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    heads: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_checkpoint(LlamaConfig(**sizes, **heads), folder)
    return folder


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return change


@pytest.mark.parametrize(
    ("change", "flags", "code", "words"),
    [
        (
            _config(),
            ["--kv-cache-memory-bytes", "1"],
            2,
            "kv_cache_memory_bytes: 1 bytes do not hold a block",
        ),
        (_config(), ["--load-format", "gguf"], 2, "load_format: must be"),
        (_remove, [], 1, "holds no .safetensors file"),
        (_truncate, [], 1, "not a valid safetensors file"),
        (_config(intermediate_size=96), [], 1, "has shape [32, 64], expected 96"),
        (_config(hidden_act="relu"), [], 1, "hidden_act 'relu' is not one of"),
        (_config(hidden_act=["silu"]), [], 1, "hidden_act ['silu'] is not one of"),
        (_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), [], 1, "rope type 'dynamic'"),
        (_config(num_attention_heads=0), [], 1, "num_attention_heads is 0"),
    ],
)
def test_model_that_cannot_be_loaded_is_one_line(
    change: Callable[[Path], None], flags: list[str], code: int, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    change(folder)
    done = run("engine", str(folder), "--skip-tokenizer-init", "--device", "cpu", *flags, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("tercet: error: worker 0: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
