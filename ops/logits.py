"""Changes to logits before a token is chosen: allowed tokens, bias, penalties, bad words. All in place.

Dimensions: B rows of the batch, b rows that a change concerns, V vocabulary. Padded columns make every change
one call for all rows; ids are padded with -1. Where several entries of a row may fall on one logit, the
change is added (0 for padding, -inf to mask), since that has one outcome in any order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# A CPU works on slices of the vocabulary in turn, so that a slice stays in the cache (2 cores, 64 rows of
# 49,152: 6 ms rather than 18). The number is fixed: the calls of a step must not depend on the batch.
_CPU_PENALTY_SLICES = 8


def add_at(logits_BV: Tensor, position_b: Tensor, ids_bK: Tensor, values_bK: Tensor) -> None:
    """Add values to single logits.

    Args:
        logits_BV: [B, V] float32, contiguous.
        position_b: [b] int64, row of the batch of each line below.
        ids_bK: [b, K] int32 or int64, -1 where there is none.
        values_bK: [b, K] float32; 0 at padding.
    """
    flat = ids_bK.clamp(min=0) + position_b.unsqueeze(1) * logits_BV.shape[1]
    logits_BV.view(-1).scatter_add_(0, flat.view(-1), values_bK.reshape(-1))


def mask_at(logits_BV: Tensor, position_b: Tensor, ids_bK: Tensor, mask_bK: Tensor) -> None:
    """Set single logits to -inf where `mask_bK` ([b, K] bool) holds; ids as in `add_at`."""
    penalty = torch.zeros(mask_bK.shape, dtype=logits_BV.dtype, device=logits_BV.device)
    add_at(logits_BV, position_b, ids_bK, penalty.masked_fill_(mask_bK & (ids_bK >= 0), -torch.inf))


def unpack_bits(bits_bW: Tensor, vocab_size: int) -> Tensor:
    """[b, V] bool from [b, W] uint8, 8 W >= V; token t is bit t % 8 of byte t // 8."""
    table = _unpacked_bytes(bits_bW.device)
    return table.index_select(0, bits_bW.reshape(-1).int()).view(len(bits_bW), -1)[:, :vocab_size]


def apply_penalties(
    logits_bV: Tensor, seen_bV: Tensor, repetition_b1: Tensor, frequency_b1: Tensor, presence_b1: Tensor
) -> None:
    """Repetition penalty over prompt and output, frequency and presence penalties over the output.

    Args:
        logits_bV: [b, V] float32.
        seen_bV: [b, V] int32, twice the number of times in the output, plus 1 if in the prompt.
        repetition_b1: [b, 1] float32; logits of seen tokens are divided by it if positive, else multiplied.
        frequency_b1: [b, 1] float32, subtracted once for each time in the output.
        presence_b1: [b, 1] float32, subtracted if in the output.

    Source: repetition as in CTRL, Keskar et al. 2019, section 4.1, and as served by transformers; frequency
    and presence as in OpenAI's API reference.
    """
    slices = _CPU_PENALTY_SLICES if logits_bV.device.type == "cpu" else 1
    width = -(-logits_bV.shape[1] // slices)
    for logits, seen in zip(logits_bV.split(width, dim=1), seen_bV.split(width, dim=1), strict=True):
        _penalize(logits, seen, repetition_b1, frequency_b1, presence_b1)


def _penalize(
    logits_bV: Tensor, seen_bV: Tensor, repetition_b1: Tensor, frequency_b1: Tensor, presence_b1: Tensor
) -> None:
    # The factor is 1 + is_seen * (x - 1), x = 1 / repetition for positive and repetition for negative logits:
    # torch.where with broadcast columns costs five times as much on a CPU, addcmul_ twice.
    half_sum_b1 = (repetition_b1.reciprocal() + repetition_b1) / 2
    half_difference_b1 = (repetition_b1.reciprocal() - repetition_b1) / 2
    factor_bV = logits_bV.sign().mul_(half_difference_b1).add_(half_sum_b1 - 1)
    logits_bV.mul_(factor_bV.mul_(seen_bV.clamp(max=1).float()).add_(1))
    count_bV = (seen_bV >> 1).float()
    is_present_bV = count_bV.clamp(max=1)
    logits_bV.sub_(count_bV.mul_(frequency_b1)).sub_(is_present_bV.mul_(presence_b1))


def match_bad_words(
    words_bNL: Tensor, history_RM: Tensor, row_b: Tensor, length_b: Tensor, prompt_len_b: Tensor
) -> Tensor:
    """Which words would be completed by the next token: [b, N] bool.

    Args:
        words_bNL: [b, N, L] int32, words backwards: last token first, then -1 after the first token.
        history_RM: [rows, max_model_len] int32, prompt and output tokens.
        row_b: [b] int64, line of the history.
        length_b, prompt_len_b: [b], tokens known, and of those in the prompt. Only the output is matched.
    """
    back_L = torch.arange(1, words_bNL.shape[2], device=words_bNL.device)
    index_bL = length_b.unsqueeze(1) - back_L
    in_output_bL = index_bL >= prompt_len_b.unsqueeze(1)
    recent_bL = history_RM[row_b.unsqueeze(1), index_bL.clamp(min=0)].masked_fill(~in_output_bL, -2)
    before_bNL = words_bNL[:, :, 1:]
    matches_bNL = (before_bNL == recent_bL.unsqueeze(1)) | (before_bNL < 0)
    return matches_bNL.all(dim=-1) & (words_bNL[:, :, 0] >= 0)


@functools.cache
def _unpacked_bytes(device: torch.device) -> Tensor:
    """[256, 8] bool: the bits of each byte, lowest first."""
    bytes_ = torch.arange(256, dtype=torch.int32, device=device).unsqueeze(1)
    return (bytes_ >> torch.arange(8, dtype=torch.int32, device=device) & 1).bool()
