"""Shapes of models to measure with random weights: nothing but a config.json, written on the spot.

A, B and S are those of the workloads; `tiny` shrinks each so that its benchmark runs on a CPU in seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder in Hugging Face's terms."""

    name: str
    title: str
    architecture: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    rope_theta: float
    max_len: int = 8192
    dtype: str = "bfloat16"
    rms_norm_eps: float = 1e-5

    def config(self) -> dict[str, Any]:
        """As config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_len,
            "rms_norm_eps": self.rms_norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "torch_dtype": self.dtype,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    def write(self, folder: Path) -> Path:
        """Make `folder` a model without weights, for load_format='dummy'; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1) + "\n")
        return folder

    def tiny(self) -> Shape:
        """The same architecture, small enough for a CPU."""
        return replace(
            self,
            title=f"{self.title}, tiny",
            hidden=64,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=16,
            intermediate=128,
            vocab=512,
            max_len=256,
            dtype="float32",
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "A", "Qwen3-0.6B", "Qwen3ForCausalLM", "qwen3",
            hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=3072,
            vocab=151936, tied=True, rope_theta=1e6, rms_norm_eps=1e-6,
        ),
        Shape(
            "B", "Llama-3.1-8B", "LlamaForCausalLM", "llama",
            hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
            vocab=128256, tied=False, rope_theta=5e5,
        ),
        Shape(
            "S", "SmolLM2-135M", "LlamaForCausalLM", "llama",
            hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64, intermediate=1536,
            vocab=49152, tied=True, rope_theta=1e5,
        ),
    )
}  # fmt: skip
