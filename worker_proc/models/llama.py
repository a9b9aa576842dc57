"""Llama (1 to 3), and what shares its form: SmolLM2, TinyLlama, Yi."""

from __future__ import annotations

from tercet.worker_proc.models.config import FULL_ATTENTION, ConfigReader, DecoderSpec
from tercet.worker_proc.models.decoder import CausalLM


class LlamaForCausalLM(CausalLM):
    """Source: Touvron et al. 2023; Llama 3 herd of models, 2024."""

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        attention_bias = config.flag("attention_bias", False)
        num_layers = config.integer("num_hidden_layers")
        return DecoderSpec(
            hidden_size=config.integer("hidden_size"),
            intermediate_size=config.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer("num_key_value_heads", config.integer("num_attention_heads")),
            head_dim=config.head_dim(),
            vocab_size=config.integer("vocab_size"),
            max_position_embeddings=config.integer("max_position_embeddings", 2048),
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope={FULL_ATTENTION: config.rope()},
            layer_types=(FULL_ATTENTION,) * num_layers,
            activation=config.activation("hidden_act"),
            tie_word_embeddings=config.flag("tie_word_embeddings", False),
            qkv_bias=attention_bias,
            o_bias=attention_bias,
            mlp_bias=config.flag("mlp_bias", False),
        )
