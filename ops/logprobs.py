"""Log-probabilities of chosen tokens and of the most likely ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ops.registry import operation
from tercet.ops.triton_support import TRITON, on_cuda

# Prompt positions scored at a time: bounds the temporaries to a few times this many rows of the vocabulary.
_ROWS_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """One line per token: the chosen token, then the k most likely ones, best first."""

    token_ids: Tensor  # i32[t, 1 + k]
    logprobs: Tensor  # f32[t, 1 + k]
    rank: Tensor  # i32[t], of the chosen token: 1 + number of tokens with a greater logit


def gather_logprobs(logits_TV: Tensor, chosen_T: Tensor, k: int) -> LogprobColumns:
    """Score one token of each row under log_softmax(logits).

    Args:
        logits_TV: [T, V] float32, not changed.
        chosen_T: [T] int32 or int64.
        k: number of most likely tokens beside the chosen one, 0 to V.
    """
    chosen_T1 = chosen_T.long().unsqueeze(1)
    chosen_logit_T1 = logits_TV.gather(1, chosen_T1)
    total_T, rank_T = logsumexp_and_rank(logits_TV, chosen_logit_T1.squeeze(1))
    top = logits_TV.topk(k, dim=-1)
    logits = torch.cat((chosen_logit_T1, top.values), dim=1)
    return LogprobColumns(
        token_ids=torch.cat((chosen_T1, top.indices), dim=1).int(),
        logprobs=logits - total_T.unsqueeze(1),
        rank=rank_T,
    )


@operation("logsumexp_and_rank")
def logsumexp_and_rank(logits_TV: Tensor, chosen_logit_T: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of each row's sum of exponentials, and the place of one of its logits.

    The kernel sums each row in one order whatever the number of rows; torch's own sum does not.

    Args:
        logits_TV: [T, V] float32, contiguous.
        chosen_logit_T: [T] float32.

    Returns:
        float32 [T], and int32 [T]: 1 + number of logits greater than the chosen one.
    """
    rank_T = (logits_TV > chosen_logit_T.unsqueeze(1)).sum(dim=-1, dtype=torch.int32) + 1
    return logits_TV.logsumexp(dim=-1), rank_T


logsumexp_and_rank.kernel(TRITON, "tercet.ops.triton_rows", supports=on_cuda)


def compute_prompt_logprobs(logits_TV: Tensor, target_ids_T: Tensor, k: int) -> LogprobColumns:
    """Score prompt tokens: row t of the logits scores target t, the token at the next position.

    Args:
        logits_TV: [T, V] float32 logits as the model gave them, not changed.
        target_ids_T: [T] int32 or int64.
        k: number of most likely tokens beside the target, 0 to V.
    """
    parts = [
        gather_logprobs(logits, targets, k)
        for logits, targets in zip(
            logits_TV.split(_ROWS_AT_A_TIME), target_ids_T.split(_ROWS_AT_A_TIME), strict=True
        )
    ]
    if len(parts) == 1:
        return parts[0]
    return LogprobColumns(
        token_ids=torch.cat([part.token_ids for part in parts]),
        logprobs=torch.cat([part.logprobs for part in parts]),
        rank=torch.cat([part.rank for part in parts]),
    )
