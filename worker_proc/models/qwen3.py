"""Qwen3 (dense): Qwen2 with norms on queries and keys instead of biases, and heads of a size of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from tercet.worker_proc.models.config import ConfigReader, DecoderSpec
from tercet.worker_proc.models.llama import LlamaForCausalLM
from tercet.worker_proc.models.qwen2 import Qwen2ForCausalLM, with_window_above


class Qwen3ForCausalLM(LlamaForCausalLM):
    """Source: Qwen3 technical report, Yang et al. 2025."""

    config_defaults: ClassVar[Mapping[str, object]] = {**Qwen2ForCausalLM.config_defaults, "head_dim": 128}

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        spec = with_window_above(super().read_spec(config), config)
        return replace(spec, qk_norm=True, mlp_bias=False)
