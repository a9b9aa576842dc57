"""Rotary position embedding: from a config's parameters to the angles of each token.

Angles are computed in float32. A CPU computes them from the positions once a step; a GPU, where each of the six
operations of that is a launch, looks them up in tables (64 MB in bfloat16 for a context of 131,072). What rotates
heads by them is `ops.rotary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.errors import UnsupportedModelError


@dataclass(frozen=True)
class RopeParameters:
    """RoPE of one kind of layer.

    Attributes:
        rope_type: default, linear, llama3, yarn or longrope.
        theta: base of the frequencies.
        rotary_dim: how many elements of a head are rotated; even.
        max_position_embeddings: the model's context length.
        max_length: the longest sequence that will be served; longrope chooses its factors by it.
        scaling: the config's remaining rope parameters.
    """

    rope_type: str
    theta: float
    rotary_dim: int
    max_position_embeddings: int
    max_length: int
    scaling: Mapping[str, object]

    def number(self, key: str, default: float | None = None) -> float:
        """A parameter as a float.

        Raises:
            UnsupportedModelError: absent without a default, or not a number.
        """
        value = self.scaling.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UnsupportedModelError(f"rope parameter {key!r} is {value!r}, expected a number")
        return float(value)

    def numbers(self, key: str) -> list[float]:
        """A parameter as one float for each frequency.

        Raises:
            UnsupportedModelError: absent or of another length.
        """
        value = self.scaling.get(key)
        count = self.rotary_dim // 2
        if not isinstance(value, list) or len(value) != count:
            raise UnsupportedModelError(f"rope parameter {key!r} must be a list of {count} numbers")
        return [float(item) for item in value]

    @property
    def original_length(self) -> float:
        """Context length before the scaling was applied."""
        return self.number("original_max_position_embeddings", self.max_position_embeddings)


class RotaryEmbedding:
    """Angles for positions.

    Raises:
        UnsupportedModelError: the rope type is unknown or a parameter is missing.
    """

    def __init__(self, parameters: RopeParameters, device: torch.device) -> None:
        compute = _ROPE_TYPES.get(parameters.rope_type)
        if compute is None:
            known = ", ".join(_ROPE_TYPES)
            raise UnsupportedModelError(f"rope type {parameters.rope_type!r} is not one of: {known}")
        inv_freq_R, self.attention_factor = compute(parameters)
        self.inv_freq = inv_freq_R.to(device)
        self._max_length = parameters.max_length
        self._tables: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def angles(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, rotary_dim], both halves alike."""
        if positions_T.device.type != "cuda":
            return self._compute(positions_T, dtype)
        if dtype not in self._tables:
            every_position = torch.arange(self._max_length + 1, device=positions_T.device)
            self._tables[dtype] = self._compute(every_position, dtype)
        cos_table, sin_table = self._tables[dtype]
        return cos_table.index_select(0, positions_T), sin_table.index_select(0, positions_T)

    def _compute(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles_TR = positions_T[:, None].float() * self.inv_freq
        angles_TR = torch.cat((angles_TR, angles_TR), dim=-1)
        cos_TR, sin_TR = angles_TR.cos(), angles_TR.sin()
        if self.attention_factor != 1.0:
            cos_TR, sin_TR = cos_TR * self.attention_factor, sin_TR * self.attention_factor
        return cos_TR.to(dtype), sin_TR.to(dtype)


# Inverse frequencies [rotary_dim / 2] and the factor on cos and sin.
Frequencies = tuple[Tensor, float]


def _powers(p: RopeParameters) -> Tensor:
    """theta^(2i / rotary_dim)."""
    exponents: Tensor = torch.arange(0, p.rotary_dim, 2, dtype=torch.float32) / p.rotary_dim
    return torch.pow(torch.tensor(p.theta, dtype=torch.float32), exponents)


def _default(p: RopeParameters) -> Frequencies:
    """Su et al. 2021."""
    return 1.0 / _powers(p), 1.0


def _linear(p: RopeParameters) -> Frequencies:
    """Position interpolation, Chen et al. 2023."""
    return 1.0 / _powers(p) / p.number("factor"), 1.0


def _llama3(p: RopeParameters) -> Frequencies:
    """Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    inv_freq = 1.0 / _powers(p)
    factor, length = p.number("factor"), p.original_length
    low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
    rotations = length * inv_freq / (2 * math.pi)  # over the original context
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * inv_freq / factor + blend * inv_freq, 1.0


def _yarn(p: RopeParameters) -> Frequencies:
    """YaRN, Peng et al. 2023, sections 3.2 to 3.4."""
    powers = _powers(p)
    factor = p.number("factor", p.max_position_embeddings / p.original_length)
    fast, slow = p.number("beta_fast", 32.0), p.number("beta_slow", 1.0)

    def dimension(rotations: float) -> float:
        """Which frequency makes this many rotations over the original context."""
        ratio = p.original_length / (rotations * 2 * math.pi)
        return p.rotary_dim * math.log(ratio) / (2 * math.log(p.theta))

    first, last = dimension(fast), dimension(slow)
    if p.scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, p.rotary_dim - 1)
    index = torch.arange(p.rotary_dim // 2, dtype=torch.float32)
    ramp = ((index - first) / max(last - first, 0.001)).clamp(0, 1)
    inv_freq = ramp / (factor * powers) + (1 - ramp) / powers
    return inv_freq, _yarn_attention_factor(p, factor)


def _yarn_attention_factor(p: RopeParameters, factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if p.scaling.get("attention_factor") is not None:
        return p.number("attention_factor")
    if p.scaling.get("mscale") and p.scaling.get("mscale_all_dim"):
        return mscale(p.number("mscale")) / mscale(p.number("mscale_all_dim"))
    return mscale(1.0)


def _longrope(p: RopeParameters) -> Frequencies:
    """LongRoPE, Ding et al. 2024: one factor for each frequency.

    The factors are chosen once, by the longest sequence that will be served, and not by each sequence's
    length: keys already cached could not be rotated again when a sequence crosses the original length, and
    one sequence's tokens must not depend on its neighbours.
    """
    original = p.original_length
    key = "long_factor" if p.max_length > original else "short_factor"
    inv_freq = 1.0 / (torch.tensor(p.numbers(key), dtype=torch.float32) * _powers(p))
    if p.scaling.get("attention_factor") is not None:
        return inv_freq, p.number("attention_factor")
    factor = p.number("factor", p.max_position_embeddings / original)
    return inv_freq, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


_ROPE_TYPES: dict[str, Callable[[RopeParameters], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
