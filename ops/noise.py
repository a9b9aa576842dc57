"""Sampling noise: a pure function of (seed, output position, kind of draw, token id).

There is no generator and no state. A row's draw is the same in any batch, row, step, variant or process, and
a resumed request draws what it would have drawn, because nothing but the four inputs enters. All arithmetic
is 32-bit integer with wrap-around (a dozen instructions for a token in a kernel) until the last conversion.

    key      = two 32-bit words for each row, from (seed low, seed high, position, kind), both mixed twice
    bits     = lowbias32(token_id ^ key[0]), with key[1] added between the two multiplications
    v        = (31 bits + 1/2) * 2^-31, in (0, 1), finely spaced near 0
    noise    = -log(1 - v), exponential; argmax of logit - log(noise) is a sample (Gumbel-max)

The side where v is near 0 decides who wins, hence 31 bits and log1p: with u = 1 - v of 24 bits, some token of
a vocabulary of 50,000 would draw noise 0 (and win outright) once in 340 draws.

Sources: lowbias32 is the mixer found by C. Wellons' hash-prospector, 2018 (its exact bias: 0.174);
Gumbel-max in the exponential form: Maddison, Tarlow, Minka, "A* Sampling", 2014.
"""

from __future__ import annotations

import enum
import functools

import numpy as np
import torch
from torch import Tensor

_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B - (1 << 32)  # as int32
_POSITION_MULTIPLIERS = (0x9E3779B9 - (1 << 32), 0x85EBCA77 - (1 << 32))  # odd, one for each key word
_KIND_MULTIPLIERS = (0x632BE5AB, 0xC2B2AE3D - (1 << 32))
# The float just below 2^-31: 31 one-bits round up to 2^31, and v must stay below 1.
_TO_UNIT = (1.0 - 2.0**-24) * 2.0**-31


class DrawKind(enum.IntEnum):
    """Which decision the noise is for, so that several draws at one position are independent."""

    TOKEN = 0  # the next token, from the target model's distribution


def split_seed(seed: int) -> tuple[int, int]:
    """The low and high words of a 64-bit unsigned seed, as int32.

    Raises:
        ValueError: the seed is negative or has more than 64 bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is not an unsigned 64-bit number")
    low, high = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32).view(np.int32)
    return int(low), int(high)


def noise_keys(seeds_2B1: Tensor, position_B: Tensor, kind: int = DrawKind.TOKEN) -> Tensor:
    """The key words of each row's draw.

    Args:
        seeds_2B1: [2, B, 1] int32, low and high words (`split_seed`).
        position_B: [B] int32, index of the output token that is drawn, 0 for the first.
        kind: a `DrawKind`.

    Returns:
        [2, B, 1] int32.
    """
    positions, kinds = _multipliers(seeds_2B1.device)
    keys = positions * position_B.view(1, -1, 1) + kinds * int(kind)
    scratch = torch.empty_like(keys)
    lowbias32_(keys.add_(seeds_2B1), scratch)
    return lowbias32_(keys.bitwise_xor_(seeds_2B1.flip(0)), scratch)


def log_exponential(token_ids: Tensor, keys_2B1: Tensor) -> Tensor:
    """Logarithm of the exponential noise of each token; subtract it from the logits, then take the argmax.

    Args:
        token_ids: [n] (the same for every row) or [B, n], int32.
        keys_2B1: [2, B, 1] int32, from `noise_keys`.

    Returns:
        [B, n] float32, within [-22.3, 2.9].
    """
    bits = torch.bitwise_xor(token_ids, keys_2B1[0])
    scratch = torch.empty_like(bits)
    _xor_shift_(bits, 16, scratch).mul_(_MULTIPLIER_1)
    _xor_shift_(bits, 15, scratch).add_(keys_2B1[1]).mul_(_MULTIPLIER_2)
    _xor_shift_(bits, 16, scratch).bitwise_and_(0x7FFFFFFF)
    noise = scratch.view(torch.float32).copy_(bits)
    noise.add_(0.5).mul_(-_TO_UNIT)
    return noise.log1p_().neg_().log_()


def lowbias32_(words: Tensor, scratch: Tensor) -> Tensor:
    """Mix int32 words in place (a bijection); `scratch` is a tensor like `words`."""
    _xor_shift_(words, 16, scratch).mul_(_MULTIPLIER_1)
    _xor_shift_(words, 15, scratch).mul_(_MULTIPLIER_2)
    return _xor_shift_(words, 16, scratch)


def _xor_shift_(words: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """words ^= words >>> shift. int32 shifts copy the sign, which the mask takes off again."""
    torch.bitwise_right_shift(words, shift, out=scratch)
    return words.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


@functools.cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    """Position and kind multipliers, [2, 1, 1] int32 each; kept, since making them copies from the host."""
    return (
        torch.tensor(_POSITION_MULTIPLIERS, dtype=torch.int32, device=device).view(2, 1, 1),
        torch.tensor(_KIND_MULTIPLIERS, dtype=torch.int32, device=device).view(2, 1, 1),
    )
