"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and windows in the upper layers where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from tercet.worker_proc.models.config import FULL_ATTENTION, SLIDING_ATTENTION, ConfigReader, DecoderSpec
from tercet.worker_proc.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Source: Qwen2 technical report, Yang et al. 2024."""

    config_defaults: ClassVar[Mapping[str, object]] = {"sliding_window": 4096, "max_window_layers": 28}

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        spec = with_window_above(super().read_spec(config), config)
        return replace(spec, qkv_bias=True, o_bias=False, mlp_bias=False)


def with_window_above(spec: DecoderSpec, config: ConfigReader) -> DecoderSpec:
    """The same decoder, sliding from layer max_window_layers on if use_sliding_window is set."""
    if not config.flag("use_sliding_window", False):
        return spec
    num_full = min(config.optional_integer("max_window_layers") or 0, spec.num_layers)
    default = (FULL_ATTENTION,) * num_full + (SLIDING_ATTENTION,) * (spec.num_layers - num_full)
    (rope,) = spec.rope.values()
    return replace(
        spec,
        sliding_window=config.optional_integer("sliding_window"),
        layer_types=config.layer_types(default),
        rope={FULL_ATTENTION: rope, SLIDING_ATTENTION: rope},
    )
