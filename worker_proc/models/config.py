"""What a decoder is made of, and reading it out of a config.json.

`DecoderSpec` holds numbers and choices only; `ConfigReader` gives config values with their types checked, as
a config is input from outside. Which key means what for an architecture is said in that architecture's file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tercet.errors import UnsupportedModelError
from tercet.worker_proc.rope import RopeParameters

FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer.

    Attributes:
        activation: 'silu' or 'gelu_tanh', of the gate.
        layer_types: FULL_ATTENTION or SLIDING_ATTENTION for each layer.
        sliding_window: window of the sliding layers.
        rope: parameters for each layer type in use.
        attention_scale: factor on q·k; None for head_dim ** -0.5.
        norm_weight_offset: 1 where norm weights are stored as weight - 1.
        embedding_scale: factor on token embeddings.
        logit_soft_cap: final logits become cap * tanh(logits / cap).
        attention_soft_cap: the same for attention scores.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Mapping[str, RopeParameters]
    layer_types: tuple[str, ...]
    activation: str = "silu"
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    norm_weight_offset: float = 0.0
    embedding_scale: float | None = None
    logit_soft_cap: float | None = None
    attention_soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_kv_heads})"
            )
        if len(self.layer_types) != self.num_layers:
            raise UnsupportedModelError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_layers}"
            )
        if SLIDING_ATTENTION in self.layer_types and not self.sliding_window:
            raise UnsupportedModelError("layer_types has sliding layers, but sliding_window is not set")

    @property
    def sliding_windows(self) -> list[int | None]:
        """The window of each layer; None where it sees everything."""
        return [self.sliding_window if kind == SLIDING_ATTENTION else None for kind in self.layer_types]


class ConfigReader:
    """Typed access to a config.json.

    Args:
        config: the parsed file.
        max_length: the longest sequence that will be served; None for all that the model can.

    Every method raises UnsupportedModelError, naming the key, where a value is missing or of the wrong type.
    """

    def __init__(self, config: Mapping[str, object], max_length: int | None = None) -> None:
        self.config = config
        self.max_length = max_length

    def with_defaults(self, defaults: Mapping[str, object]) -> ConfigReader:
        """The same config with keys that it lacks; a null in the config stays null."""
        return ConfigReader({**defaults, **self.config}, self.max_length)

    def _value(self, key: str, default: object) -> object:
        value = self.config.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UnsupportedModelError(f"config.json: {key} is {value!r}, expected a positive integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """As `integer`, but absent, null and 0 mean None."""
        return self.integer(key) if self.config.get(key) else None

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UnsupportedModelError(f"config.json: {key} is {value!r}, expected a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.config.get(key) is not None else None

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise UnsupportedModelError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def activation(self, key: str) -> str:
        value = self._value(key, "silu")
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise UnsupportedModelError(
                f"config.json: {key} {value!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[value]

    def head_dim(self) -> int:
        """Given, or hidden_size / num_attention_heads."""
        return self.integer("head_dim", self.integer("hidden_size") // self.integer("num_attention_heads"))

    def layer_types(self, default: tuple[str, ...]) -> tuple[str, ...]:
        value = self.config.get("layer_types")
        if value is None:
            return default
        if not isinstance(value, list) or any(
            kind not in (FULL_ATTENTION, SLIDING_ATTENTION) for kind in value
        ):
            raise UnsupportedModelError(
                f"config.json: layer_types must list {FULL_ATTENTION!r} and {SLIDING_ATTENTION!r} only"
            )
        return tuple(value)

    def rope(self, layer_type: str | None = None) -> RopeParameters:
        """RoPE parameters, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old configs).

        Args:
            layer_type: where `rope_parameters` holds one entry for each layer type.
        """
        scaling = dict(self._mapping("rope_parameters") or self._mapping("rope_scaling"))
        if layer_type is not None and isinstance(nested := scaling.get(layer_type), Mapping):
            scaling = dict(nested)
        rope_type = str(scaling.get("rope_type") or scaling.get("type") or "default")
        scaling.setdefault("rope_theta", self.number("rope_theta", 10_000.0))
        scaling.setdefault("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        if "original_max_position_embeddings" in self.config:
            original = self.integer("original_max_position_embeddings")
            scaling.setdefault("original_max_position_embeddings", original)
        return self.rope_from(rope_type, scaling)

    def rope_from(self, rope_type: str, scaling: Mapping[str, object]) -> RopeParameters:
        """RoPE parameters from an explicit mapping with rope_theta in it."""
        values = ConfigReader(scaling)
        rotary_dim = int(self.head_dim() * values.number("partial_rotary_factor", 1.0))
        if rotary_dim % 2 or not 0 < rotary_dim <= self.head_dim():
            raise UnsupportedModelError(
                f"config.json: {rotary_dim} rotated elements of a head are not possible"
            )
        max_position_embeddings = self.integer("max_position_embeddings", 2048)
        return RopeParameters(
            rope_type={"su": "longrope"}.get(rope_type, rope_type),
            theta=values.number("rope_theta"),
            rotary_dim=rotary_dim,
            max_position_embeddings=max_position_embeddings,
            max_length=self.max_length or max_position_embeddings,
            scaling=scaling,
        )

    def _mapping(self, key: str) -> Mapping[str, object]:
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise UnsupportedModelError(f"config.json: {key} is {value!r}, expected an object")
        return value
