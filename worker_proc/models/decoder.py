"""The decoder that the model files share: attention, feed-forward, layer, and the model around them.

A model file says how its config becomes a `DecoderSpec` and replaces what differs. Module names are those of
Hugging Face checkpoints, but for projections that are merged here (`packed_weights`).
Dimensions: T tokens, D hidden size, H heads, K KV heads, R rotated elements, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from tercet import ops
from tercet.ops import AttentionMetadata
from tercet.worker_proc.layers import (
    MergedColumnParallelLinear,
    ParallelLMHead,
    Placement,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tercet.worker_proc.models.config import ConfigReader, DecoderSpec
from tercet.worker_proc.rope import RotaryEmbedding

Angles = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Grouped-query attention over the paged cache, with RoPE and, where the model has it, QK norm."""

    def __init__(self, spec: DecoderSpec, layer: int, place: Placement) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.scale = spec.attention_scale or spec.head_dim**-0.5
        self.sliding_window = spec.sliding_windows[layer]
        self.soft_cap = spec.attention_soft_cap
        self.qkv_proj = QKVParallelLinear(
            spec.hidden_size,
            spec.head_dim,
            spec.num_heads,
            spec.num_kv_heads,
            bias=spec.qkv_bias,
            place=place,
        )
        self.o_proj = RowParallelLinear(
            spec.num_heads * spec.head_dim, spec.hidden_size, bias=spec.o_bias, place=place
        )
        self.num_kv_heads = self.qkv_proj.num_kv_heads
        self.qk_norm = spec.qk_norm
        self.rms_norm_eps, self.norm_weight_offset = spec.rms_norm_eps, spec.norm_weight_offset
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, place, spec.norm_weight_offset)
            self.k_norm = RMSNorm(spec.head_dim, spec.rms_norm_eps, place, spec.norm_weight_offset)

    def forward(
        self,
        norm: RMSNorm,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        angles: Angles,
        kv_cache: Tensor,
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Attention over norm(x + residual), and that sum."""
        qkv_TX, total_TD = self.qkv_proj.after_norm(norm, x_TD, residual_TD)
        qkv_THD = qkv_TX.unflatten(-1, (-1, self.head_dim))
        q_THD = ops.rope_and_write_kv(
            qkv_THD,
            *angles,
            kv_cache,
            meta.slot_mapping_T,
            qk_norm=(self.q_norm.weight, self.k_norm.weight) if self.qk_norm else None,
            eps=self.rms_norm_eps,
            weight_offset=self.norm_weight_offset,
        )
        out_THD = ops.paged_attention(
            q_THD,
            kv_cache,
            meta,
            scale=self.scale,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
        )
        return self.o_proj(out_THD.flatten(1)), total_TD


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, spec: DecoderSpec, place: Placement) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            spec.hidden_size, (size, size), ("gate", "up"), bias=spec.mlp_bias, place=place
        )
        self.down_proj = RowParallelLinear(size, spec.hidden_size, bias=spec.mlp_bias, place=place)
        self.activation: ops.Activation = "silu" if spec.activation == "silu" else "gelu_tanh"

    def forward(self, norm: RMSNorm, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The feed-forward of norm(x + residual), and that sum."""
        merged = self.gate_up_proj
        hidden_TF, total_TD = ops.add_rms_norm_gated_linear(
            x_TD, norm.preceding(residual_TD), merged.weight, merged.bias, self.activation
        )
        return self.down_proj(hidden_TF), total_TD


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward. The residual stream travels apart, so that adding and norming are
    one operation."""

    def __init__(self, spec: DecoderSpec, layer: int, place: Placement) -> None:
        super().__init__()
        self.self_attn = Attention(spec, layer, place)
        self.mlp = GatedMLP(spec, place)
        self.input_layernorm = self.norm(spec, place)
        self.post_attention_layernorm = self.norm(spec, place)

    @staticmethod
    def norm(spec: DecoderSpec, place: Placement) -> RMSNorm:
        return RMSNorm(spec.hidden_size, spec.rms_norm_eps, place, spec.norm_weight_offset)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        angles: Angles,
        kv_cache: Tensor,
        meta: AttentionMetadata,
    ) -> tuple[Tensor, Tensor]:
        """The layer's output and the residual that is still to be added to it; the first layer gets none."""
        x_TD, total_TD = self.self_attn(self.input_layernorm, x_TD, residual_TD, angles, kv_cache, meta)
        x_TD, total_TD = self.mlp(self.post_attention_layernorm, x_TD, total_TD)
        return x_TD, total_TD


class Decoder(nn.Module):
    """Embedding, layers and final norm: token ids to hidden states."""

    def __init__(self, spec: DecoderSpec, layer_class: type[DecoderLayer], place: Placement) -> None:
        super().__init__()
        self.layer_types = spec.layer_types
        self.embedding_scale = spec.embedding_scale
        if spec.embedding_scale is not None:  # rounded to the model's dtype, as Gemma was trained
            self.embedding_scale = torch.tensor(spec.embedding_scale, dtype=place.dtype).item()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size, place)
        layers = [layer_class(spec, i, place) for i in range(spec.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.num_kv_heads = layers[0].self_attn.num_kv_heads
        self.norm = DecoderLayer.norm(spec, place)
        self.rotary = {kind: RotaryEmbedding(rope, place.device) for kind, rope in spec.rope.items()}

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, kv_caches: list[Tensor], meta: AttentionMetadata
    ) -> Tensor:
        x_TD = self.embed_tokens(token_ids_T)
        if self.embedding_scale is not None:
            x_TD = x_TD * self.embedding_scale
        angles = {kind: rotary.angles(positions_T, x_TD.dtype) for kind, rotary in self.rotary.items()}
        residual_TD: Tensor | None = None
        for layer, kind, kv_cache in zip(self.layers, self.layer_types, kv_caches, strict=True):
            x_TD, residual_TD = layer(x_TD, residual_TD, angles[kind], kv_cache, meta)
        hidden_TD, _ = self.norm.add(x_TD, residual_TD)
        return hidden_TD


class CausalLM(nn.Module):
    """A language model over a paged KV cache.

    Args:
        config: config.json of the checkpoint.
        place: device, dtype and tensor-parallel rank of the weights, which are left uninitialised.

    Attributes:
        spec: what it is made of.
        num_layers, head_dim, vocab_size: as in the spec.
        num_kv_heads: KV heads on this rank; the cache of a layer is
            [2, num_blocks, block_size, num_kv_heads, head_dim].
        sliding_windows: the window of each layer, None where it sees everything.

    Raises:
        UnsupportedModelError: the config lacks a key, or asks for something that is not implemented.
        ConfigError: the model cannot be cut into that many ranks.
    """

    layer_class: ClassVar[type[DecoderLayer]] = DecoderLayer
    # what keys mean when config.json leaves them out
    config_defaults: ClassVar[Mapping[str, object]] = {}
    # last module name in the checkpoint -> (module here, which shard of it)
    packed_weights: ClassVar[dict[str, tuple[str, str]]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    }

    def __init__(self, config: ConfigReader, place: Placement) -> None:
        super().__init__()
        spec = self.spec = self.read_spec(config.with_defaults(self.config_defaults))
        self.model = Decoder(spec, self.layer_class, place)
        tied = self.model.embed_tokens if spec.tie_word_embeddings else None
        self.lm_head = ParallelLMHead(spec.vocab_size, spec.hidden_size, place, tied)
        self.num_layers = spec.num_layers
        self.head_dim = spec.head_dim
        self.vocab_size = spec.vocab_size
        self.num_kv_heads = self.model.num_kv_heads
        self.sliding_windows = spec.sliding_windows

    @classmethod
    def read_spec(cls, config: ConfigReader) -> DecoderSpec:
        """What the config describes; each architecture has its own reading."""
        raise NotImplementedError

    def forward(
        self, token_ids_T: Tensor, positions_T: Tensor, kv_caches: list[Tensor], meta: AttentionMetadata
    ) -> Tensor:
        """Run one step.

        Args:
            token_ids_T: int64; the decodes first, then the chunks, as `meta` says.
            positions_T: int64, each token's place in its sequence.
            kv_caches: one for each layer, written in place.

        Returns:
            Hidden states [T, D] after the final norm.
        """
        hidden_TD: Tensor = self.model(token_ids_T, positions_T, kv_caches, meta)
        return hidden_TD

    def compute_logits(self, hidden_BD: Tensor) -> Tensor:
        """Hidden states of the tokens that are sampled from, to float32 logits [B, V]."""
        return self.finish_logits(self.lm_head(hidden_BD))

    def finish_logits(self, logits_BV: Tensor) -> Tensor:
        """What the head gives, as float32 and capped where the model caps it."""
        logits_BV = logits_BV.float()
        if (cap := self.spec.logit_soft_cap) is not None:
            logits_BV = torch.tanh(logits_BV / cap) * cap
        return logits_BV
