"""Gemma 3, text only: norms around each half of a layer, sliding layers with a RoPE of their own between
full ones, QK norm, scaled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from tercet.errors import UnsupportedModelError
from tercet.ops import AttentionMetadata
from tercet.worker_proc.layers import Placement
from tercet.worker_proc.models.config import FULL_ATTENTION, SLIDING_ATTENTION, ConfigReader, DecoderSpec
from tercet.worker_proc.models.decoder import Angles, CausalLM, DecoderLayer
from tercet.worker_proc.rope import RopeParameters


class Gemma3DecoderLayer(DecoderLayer):
    """As `DecoderLayer`, with a norm also after attention and after the feed-forward."""

    def __init__(self, spec: DecoderSpec, layer: int, place: Placement) -> None:
        super().__init__(spec, layer, place)
        self.pre_feedforward_layernorm = self.norm(spec, place)
        self.post_feedforward_layernorm = self.norm(spec, place)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        angles: Angles,
        kv_cache: Tensor,
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        x_TD, total_TD = self.self_attn(self.input_layernorm, x_TD, residual_TD, angles, kv_cache, meta)
        x_TD = self.post_attention_layernorm(x_TD)
        x_TD, total_TD = self.mlp(self.pre_feedforward_layernorm, x_TD, total_TD)
        return self.post_feedforward_layernorm(x_TD), total_TD


class Gemma3ForCausalLM(CausalLM):
    """Source: Gemma 3 technical report, 2025."""

    layer_class = Gemma3DecoderLayer
    config_defaults: ClassVar[Mapping[str, object]] = {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    }

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        if config.flag("use_bidirectional_attention", False):
            raise UnsupportedModelError("config.json: use_bidirectional_attention is not supported")
        num_layers = config.integer("num_hidden_layers")
        pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
        kinds = tuple(
            FULL_ATTENTION if (i + 1) % pattern == 0 else SLIDING_ATTENTION for i in range(num_layers)
        )
        attention_bias = config.flag("attention_bias", False)
        hidden_size = config.integer("hidden_size")
        return DecoderSpec(
            hidden_size=hidden_size,
            intermediate_size=config.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer("num_key_value_heads"),
            head_dim=config.head_dim(),
            vocab_size=config.integer("vocab_size"),
            max_position_embeddings=config.integer("max_position_embeddings"),
            rms_norm_eps=config.number("rms_norm_eps"),
            rope={FULL_ATTENTION: config.rope(FULL_ATTENTION), SLIDING_ATTENTION: _sliding_rope(config)},
            layer_types=config.layer_types(kinds),
            activation=config.activation("hidden_activation"),
            sliding_window=config.optional_integer("sliding_window"),
            tie_word_embeddings=config.flag("tie_word_embeddings", True),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            qk_norm=True,
            attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
            norm_weight_offset=1.0,
            embedding_scale=hidden_size**0.5,
            logit_soft_cap=config.optional_number("final_logit_softcapping"),
            attention_soft_cap=config.optional_number("attn_logit_softcapping"),
        )


def _sliding_rope(config: ConfigReader) -> RopeParameters:
    """The sliding layers' own base, without the scaling of the full layers."""
    if "rope_parameters" in config.config:
        return ConfigReader({**config.config, "rope_theta": 10_000.0}, config.max_length).rope(
            SLIDING_ATTENTION
        )
    return config.rope_from("default", {"rope_theta": config.number("rope_local_base_freq")})
