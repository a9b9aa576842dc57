"""Mistral: Llama with a sliding window in every layer (0.1), or without one (0.2 and later)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from tercet.worker_proc.models.config import SLIDING_ATTENTION, ConfigReader, DecoderSpec
from tercet.worker_proc.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Source: Jiang et al. 2023."""

    config_defaults: ClassVar[Mapping[str, object]] = {"sliding_window": 4096}  # null means none

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        spec = super().read_spec(config)
        return with_window_everywhere(spec, config.optional_integer("sliding_window"))


def with_window_everywhere(spec: DecoderSpec, sliding_window: int | None) -> DecoderSpec:
    """The same decoder with this window in all its layers; None leaves it as it is."""
    if sliding_window is None:
        return spec
    (rope,) = spec.rope.values()
    return replace(
        spec,
        sliding_window=sliding_window,
        layer_types=(SLIDING_ATTENTION,) * spec.num_layers,
        rope={SLIDING_ATTENTION: rope},
    )
