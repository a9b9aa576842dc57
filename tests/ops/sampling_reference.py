"""Sampling of one row as its definition says, in plain Python and float64, and a chi-square test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MASK = 0xFFFFFFFF


@dataclass
class Row:
    """A request as it stands before its next token."""

    prompt: list[int]
    outputs: list[int] = field(default_factory=list)
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    min_tokens: int = 0
    stop: Sequence[int] = ()
    bias: dict[int, float] = field(default_factory=dict)
    allowed: Sequence[int] | None = None
    bad_words: Sequence[Sequence[int]] = ()


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = x * 0x846CA68B & MASK
    return x ^ x >> 16


def keys(seed: int, position: int, kind: int = 0) -> tuple[int, int]:
    low, high = seed & MASK, seed >> 32
    first = lowbias32((low + position * 0x9E3779B9 + kind * 0x632BE5AB) & MASK) ^ high
    second = lowbias32((high + position * 0x85EBCA77 + kind * 0xC2B2AE3D) & MASK) ^ low
    return lowbias32(first), lowbias32(second)


def noise_bits(token_id: int, key: tuple[int, int]) -> int:
    x = token_id ^ key[0]
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = (x + key[1]) * 0x846CA68B & MASK
    return (x ^ x >> 16) & 0x7FFFFFFF


def log_noise(token_id: int, key: tuple[int, int]) -> float:
    return math.log(-math.log1p(-(noise_bits(token_id, key) + 0.5) * 2.0**-31))


def processed(logits: Floats, row: Row) -> Floats:
    """Logits of the row after every stage before the temperature."""
    out = logits.astype(np.float64).copy()
    if row.allowed is not None:
        for token in range(len(out)):
            if token not in row.allowed:
                out[token] = -np.inf
    for token, value in row.bias.items():
        out[token] += value
    if len(row.outputs) < row.min_tokens:
        out[list(row.stop)] = -np.inf
    for token in set(row.prompt) | set(row.outputs):
        out[token] = out[token] / row.repetition if out[token] > 0 else out[token] * row.repetition
    for token in set(row.outputs):
        out[token] -= row.frequency * row.outputs.count(token) + row.presence
    for word in row.bad_words:
        before = list(word[:-1])
        if len(before) <= len(row.outputs) and row.outputs[len(row.outputs) - len(before) :] == before:
            out[word[-1]] = -np.inf
    return out


def kept(logits: Floats, row: Row) -> list[int]:
    """Tokens that min_p, top_k and top_p leave, best first; ties in order of id."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    weight = np.exp((logits - logits[order[0]]) / row.temperature)
    prefix = [token for token in order if weight[token] > 0 and weight[token] >= row.min_p]
    if row.top_k > 0:
        prefix = prefix[: row.top_k]
    total = sum(weight[token] for token in prefix)
    result, before = [], 0.0
    for token in prefix:
        if before >= row.top_p * total and row.top_p < 1 and result:
            break
        result.append(token)
        before += weight[token]
    return result


def distribution(logits: Floats, row: Row) -> Floats:
    """Probability of each token."""
    values = processed(logits, row)
    tokens = kept(values, row)
    weight = np.zeros(len(values))
    weight[tokens] = np.exp((values[tokens] - values[tokens].max()) / row.temperature)
    return weight / weight.sum()


def draw(logits: Floats, row: Row) -> int:
    """The token that the row must draw."""
    values = processed(logits, row)
    if row.temperature == 0:
        return int(values.argmax())
    key = keys(row.seed, len(row.outputs))
    return max(kept(values, row), key=lambda token: values[token] / row.temperature - log_noise(token, key))


def chi_square_z(observed: Floats, expected: Floats) -> float:
    """Chi-square of counts against expected counts, as a standard normal deviate (Wilson and Hilferty 1931).

    Cells that expect fewer than 5 are pooled. What is never expected must never be seen.
    """
    observed, expected = observed.ravel(), expected.ravel()
    assert not observed[expected == 0].any()
    large = expected >= 5
    cells = [*zip(observed[large], expected[large], strict=True)]
    rest = expected[~large].sum()
    if rest >= 5:
        cells.append((observed[~large].sum(), rest))
    freedom = len(cells) - 1
    chi_square = sum((seen - want) ** 2 / want for seen, want in cells)
    spread = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread))
