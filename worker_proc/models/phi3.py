"""Phi-3 and Phi-4-mini: Llama whose checkpoint holds q, k, v and gate, up as one tensor each; part of a head
may be rotated, with LongRoPE for long contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from tercet.worker_proc.models.config import ConfigReader, DecoderSpec
from tercet.worker_proc.models.llama import LlamaForCausalLM
from tercet.worker_proc.models.mistral import with_window_everywhere


class Phi3ForCausalLM(LlamaForCausalLM):
    """Source: Phi-3 technical report, Abdin et al. 2024."""

    config_defaults: ClassVar[Mapping[str, object]] = {"rms_norm_eps": 1e-5}

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        spec = replace(super().read_spec(config), qkv_bias=False, o_bias=False, mlp_bias=False)
        return with_window_everywhere(spec, config.optional_integer("sliding_window"))
