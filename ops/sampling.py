"""Choosing a token of each row: argmax, Gumbel-max, and Gumbel-max among the tokens that top-k, top-p and
min-p leave.

Dimensions: B rows, V vocabulary, K candidates of a row. Tokens are ordered by (logit descending, id
ascending), a total order, so that ties at a boundary are settled the same way everywhere. With
w = exp((logit - best logit) / temperature), a row keeps a prefix of that order:

    1. w > 0 and w >= min_p, and no more than top_k tokens;
    2. of those, tokens before which less than top_p of their weight lies (so at least one).

The noise of a token depends on the row's key and the token's id alone (`noise.py`), so a row draws the same
token whether it goes through `gumbel_argmax`, a full sort or a candidate set.
Functions return the chosen token and a value that is finite unless the row's logits are broken (a NaN, an
infinity, or nothing but -inf).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops.noise import log_exponential
from tercet.ops.registry import operation

# Largest number of candidates for each attempt on a CPU, where looking at the data to choose is free.
# Measured on 2 cores for 64 rows of 49,152: top 128 takes 6 ms, top 2,048 18 ms, a sort 147 ms.
_CANDIDATE_WIDTHS = (128, 2048)
# A CPU makes noise for this many slices of the vocabulary in turn, so that a slice stays in the cache. The
# number is fixed: the calls of a step must not depend on the batch.
_CPU_NOISE_SLICES = 2
_ARGMAX_BLOCK = 64
UNBOUNDED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RowParams:
    """How each of B rows draws, as columns on the device.

    `is_random_B1` is 1 for sampled and 0 for greedy rows, None if every row is sampled. Greedy rows have
    top_k 1 and inv_temperature 1. `top_k_B1` is UNBOUNDED where it does not restrict.
    """

    inv_temperature_B1: Tensor  # f32
    is_random_B1: Tensor | None  # f32
    top_k_B1: Tensor  # i32
    top_p_B1: Tensor  # f32
    min_p_B1: Tensor  # f32

    def take(self, index_b: Tensor) -> RowParams:
        """The params of some rows."""
        return RowParams(
            self.inv_temperature_B1.index_select(0, index_b),
            None if self.is_random_B1 is None else self.is_random_B1.index_select(0, index_b),
            self.top_k_B1.index_select(0, index_b),
            self.top_p_B1.index_select(0, index_b),
            self.min_p_B1.index_select(0, index_b),
        )

    def top_k_or_min_p(self) -> Tensor:
        """[B, 1] bool: rows whose number of tokens is bounded by top_k or min_p."""
        return (self.top_k_B1 < UNBOUNDED) | (self.min_p_B1 > 0)

    def restricted(self) -> Tensor:
        """[B, 1] bool: rows that may not draw every token."""
        return self.top_k_or_min_p() | (self.top_p_B1 < 1)


@operation("argmax")
def argmax(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy choice: (token_B int64, logit_B). The lowest id wins a tie; a NaN is greater than any number."""
    value, index = logits_BV.max(dim=-1)
    return index, value


@argmax.implementation("blocked", supports=lambda device, _dtype: device.type == "cpu")
def _argmax_blocked(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """Two levels of blocks: torch's amax runs in vector registers on a CPU, its argmax does not (14 x)."""
    vocab_size = logits_BV.shape[1]
    whole = vocab_size // _ARGMAX_BLOCK * _ARGMAX_BLOCK
    block_max = logits_BV[:, :whole].unflatten(1, (-1, _ARGMAX_BLOCK)).amax(dim=-1)
    if whole < vocab_size:
        block_max = torch.cat((block_max, logits_BV[:, whole:].amax(dim=-1, keepdim=True)), dim=1)
    first = block_max.argmax(dim=-1, keepdim=True) * _ARGMAX_BLOCK
    # Past the end of the vocabulary the last token repeats: argmax takes the first of equals.
    ids = (first + _token_ids(_ARGMAX_BLOCK, logits_BV.device)).clamp_(max=vocab_size - 1)
    values = logits_BV.gather(1, ids)
    best = values.argmax(dim=-1, keepdim=True)
    return ids.gather(1, best).squeeze(1), values.gather(1, best).squeeze(1)


@operation("gumbel_argmax")
def gumbel_argmax(logits_BV: Tensor, params: RowParams, keys_2B1: Tensor) -> tuple[Tensor, Tensor]:
    """A draw from softmax(logits / temperature) over the whole vocabulary; argmax for greedy rows.

    Args:
        logits_BV: [B, V] float32, not changed.
        params: temperatures; top_k, top_p and min_p are not looked at.
        keys_2B1: [2, B, 1] int32, from `noise_keys`.

    Returns:
        (token_B int64, score_B float32).
    """
    vocab_size = logits_BV.shape[1]
    slices = _CPU_NOISE_SLICES if logits_BV.device.type == "cpu" else 1
    width = -(-vocab_size // slices)
    ids_V = _token_ids(vocab_size, logits_BV.device)
    tokens, scores = [], []
    for start in range(0, vocab_size, width):
        part = slice(start, start + width)
        noise = log_exponential(ids_V[part], keys_2B1)
        if params.is_random_B1 is not None:
            noise.mul_(params.is_random_B1)
        token, score = argmax((logits_BV[:, part] * params.inv_temperature_B1).sub_(noise))
        tokens.append(token + start)
        scores.append(score)
    if len(tokens) == 1:
        return tokens[0], scores[0]
    best = torch.stack(scores, dim=1)
    winner = best.argmax(dim=1, keepdim=True)
    return torch.stack(tokens, dim=1).gather(1, winner).squeeze(1), best.gather(1, winner).squeeze(1)


@operation("sample_restricted")
def sample_restricted(logits_BV: Tensor, params: RowParams, keys_2B1: Tensor) -> tuple[Tensor, Tensor]:
    """A draw from what min_p, top_k and top_p leave of softmax(logits / temperature).

    Rows that are greedy or not restricted may be among them. Reference: a stable sort of every row, without
    looking at the data from the host.

    Args:
        logits_BV: [B, V] float32, not changed.
        params: how each row draws.
        keys_2B1: [2, B, 1] int32, from `noise_keys`.

    Returns:
        (token_B int64, best_logit_B float32).
    """
    return _draw_from_sorted(logits_BV, params, keys_2B1)


@sample_restricted.implementation("candidates", supports=lambda device, _dtype: device.type == "cpu")
def _sample_restricted_candidates(
    logits_BV: Tensor, params: RowParams, keys_2B1: Tensor
) -> tuple[Tensor, Tensor]:
    """For a CPU: no row is sorted unless its kept tokens are not among its most likely ones.

    Which attempt settles a row depends on that row alone, so its neighbours cannot change its rounding.
    """
    num_rows = logits_BV.shape[0]
    token_B = torch.zeros(num_rows, dtype=torch.int64)
    best_B = torch.zeros(num_rows)
    restricted_B = params.restricted().squeeze(1)
    open_b = (~restricted_B).nonzero().squeeze(1)
    if open_b.numel():
        token_B[open_b], best_B[open_b] = gumbel_argmax(
            logits_BV.index_select(0, open_b), params.take(open_b), keys_2B1.index_select(1, open_b)
        )
    pending_b = restricted_B.nonzero().squeeze(1)
    for width in _CANDIDATE_WIDTHS:
        if not pending_b.numel():
            break
        rows_bV = logits_BV if pending_b.numel() == num_rows else logits_BV.index_select(0, pending_b)
        token_b, best_b, settled_b = _draw_from_candidates(
            rows_bV, params.take(pending_b), keys_2B1.index_select(1, pending_b), width
        )
        token_B[pending_b] = token_b  # of a row not settled: written again by the next attempt
        best_B[pending_b] = best_b
        pending_b = pending_b[~settled_b]
    if pending_b.numel():
        token_B[pending_b], best_B[pending_b] = _draw_from_sorted(
            logits_BV.index_select(0, pending_b), params.take(pending_b), keys_2B1.index_select(1, pending_b)
        )
    return token_B, best_B


def _draw_from_sorted(logits_BV: Tensor, params: RowParams, keys_2B1: Tensor) -> tuple[Tensor, Tensor]:
    """Sort, find the kept prefix, draw from it."""
    sorted_BV, ids_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    scaled_BV = sorted_BV * params.inv_temperature_B1
    weight_BV = _weights(scaled_BV)
    rank_V = _token_ids(logits_BV.shape[1], logits_BV.device)
    weight_BV.mul_(_passes_top_k_and_min_p(weight_BV, rank_V, params))
    before_BV = weight_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = before_BV[:, -1:].clone()
    kept_B1 = _num_kept(weight_BV, before_BV, total_B1, params)
    token_B = _draw(scaled_BV, ids_BV, rank_V < kept_B1, keys_2B1)
    return token_B, sorted_BV[:, 0]


def _draw_from_candidates(
    logits_BV: Tensor, params: RowParams, keys_2B1: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from each row's `width` best tokens: (token_B, best_logit_B, settled_B bool).

    A row is settled if the candidates are known to hold all that it keeps: its last kept logit is above the
    last candidate's, and the weight that top_p is a share of is known.
    """
    width = min(width, logits_BV.shape[1])
    value_BK, ids_BK = logits_BV.topk(width, dim=-1)
    scaled_BK = value_BK * params.inv_temperature_B1
    weight_BK = _weights(scaled_BK)
    rank_K = _token_ids(width, logits_BV.device)
    passes_BK = _passes_top_k_and_min_p(weight_BK, rank_K, params)
    weight_BK.mul_(passes_BK)
    before_BK = weight_BK.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = before_BK[:, -1:].clone()
    closed_B1 = ~passes_BK[:, -1:]  # the prefix of step 1 ends before the last candidate
    whole_B1 = ~closed_B1 & ~params.top_k_or_min_p()  # step 1 keeps the whole vocabulary
    if bool(whole_B1.any()):
        total_B1 = torch.where(whole_B1, _total_weight(logits_BV, scaled_BK[:, :1], params), total_B1)
    kept_B1 = _num_kept(weight_BK, before_BK, total_B1, params)
    last_B1 = value_BK.gather(1, kept_B1 - 1)
    broken_B1 = ~torch.isfinite(value_BK[:, :1])
    settled_B1 = ((closed_B1 | whole_B1) & (last_B1 > value_BK[:, -1:])) | broken_B1
    keep_BK = _resolve_ties(value_BK, ids_BK, last_B1, kept_B1)
    return _draw(scaled_BK, ids_BK, keep_BK, keys_2B1), value_BK[:, 0], settled_B1.squeeze(1)


def _weights(scaled_BK: Tensor) -> Tensor:
    """exp(logit - best logit) of logits in descending order, divided by the temperature already."""
    return (scaled_BK - scaled_BK[:, :1]).exp_()


def _passes_top_k_and_min_p(weight_BK: Tensor, rank_K: Tensor, params: RowParams) -> Tensor:
    """[B, K] bool: the prefix of step 1."""
    passes = (weight_BK >= params.min_p_B1).logical_and_(weight_BK > 0)
    return passes.logical_and_(rank_K < params.top_k_B1)


def _num_kept(weight_BK: Tensor, cumulative_BK: Tensor, total_B1: Tensor, params: RowParams) -> Tensor:
    """[B, 1] int64, at least 1: length of the prefix of step 2. `cumulative_BK` is overwritten."""
    before_BK = cumulative_BK.sub_(weight_BK)
    kept_BK = (before_BK < total_B1 * params.top_p_B1).logical_or_(params.top_p_B1 >= 1)
    return kept_BK.logical_and_(weight_BK > 0).sum(dim=-1, keepdim=True).clamp_(min=1)


def _total_weight(logits_BV: Tensor, best_scaled_B1: Tensor, params: RowParams) -> Tensor:
    """[B, 1] float64: weight of the whole vocabulary."""
    weights = (logits_BV * params.inv_temperature_B1).sub_(best_scaled_B1).exp_()
    return weights.sum(dim=-1, keepdim=True).double()


def _resolve_ties(value_BK: Tensor, ids_BK: Tensor, last_B1: Tensor, kept_B1: Tensor) -> Tensor:
    """[B, K] bool: all above the last kept logit, and its equals of lowest id (topk orders them freely)."""
    above_BK = value_BK > last_B1
    tied_BK = value_BK == last_B1
    num_tied_B1 = kept_B1 - above_BK.sum(dim=-1, keepdim=True)
    tied_ids_BK = ids_BK.masked_fill(~tied_BK, UNBOUNDED).sort(dim=-1).values
    last_id_B1 = tied_ids_BK.gather(1, (num_tied_B1 - 1).clamp_(min=0))
    return tied_BK.logical_and_(ids_BK <= last_id_B1).logical_or_(above_BK)


def _draw(scaled_BK: Tensor, ids_BK: Tensor, keep_BK: Tensor, keys_2B1: Tensor) -> Tensor:
    """Gumbel-max among the kept tokens: token_B int64."""
    score_BK = (scaled_BK - log_exponential(ids_BK.int(), keys_2B1)).masked_fill_(~keep_BK, -torch.inf)
    return ids_BK.gather(1, score_BK.argmax(dim=-1, keepdim=True)).squeeze(1)


@functools.lru_cache(maxsize=16)
def _token_ids(count: int, device: torch.device) -> Tensor:
    """[count] int32: 0, 1, 2, …; not to be written to."""
    return torch.arange(count, dtype=torch.int32, device=device)
