"""Log-probabilities of prompt tokens, for the rows that asked for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tercet.ipc.messages import Admission
from tercet.ops.logprobs import LogprobColumns, compute_prompt_logprobs
from tercet.worker_proc.device_batch import Chunks
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.results import PromptScores

ScorePrompts = Callable[[Tensor, int], list[PromptScores]]

_LOGIT_ROWS = 256  # prompt positions scored at a time: bounds the memory of their logits


@dataclass(frozen=True, slots=True)
class _Wanted:
    start: int  # first position still wanted
    prompt_len: int
    count: int


class PromptScoring:
    """Which rows want their prompts scored, and the scoring of a step's chunks."""

    def __init__(self, model: CausalLM, history_RM: Tensor) -> None:
        self._model = model
        self._history_RM = history_RM
        self._wanted: dict[int, _Wanted] = {}

    def admit(self, admission: Admission) -> None:
        """Note what a request wants of its prompt."""
        count = admission.sampling.prompt_logprobs
        if admission.prompt_logprobs_from >= 0 and count is not None:
            self._wanted[admission.row] = _Wanted(admission.prompt_logprobs_from, admission.prompt_len, count)

    def release(self, row: int) -> None:
        """The request leaves its row."""
        self._wanted.pop(row, None)

    def clear(self) -> None:
        """Forget every row."""
        self._wanted.clear()

    def for_step(self, chunks: Chunks) -> ScorePrompts | None:
        """What scores a step's prompts from its hidden states; None if no chunk's row wants it."""
        if not self._wanted or not any(row in self._wanted for row in chunks.row.tolist()):
            return None
        return lambda hidden_TD, num_decodes: self._score_chunks(hidden_TD, chunks, num_decodes)

    def _score_chunks(self, hidden_TD: Tensor, chunks: Chunks, first: int) -> list[PromptScores]:
        """Log-probabilities of prompt tokens whose predecessor is in a chunk."""
        found = []
        columns = zip(chunks.row.tolist(), chunks.start.tolist(), chunks.length.tolist(), strict=True)
        for row, start, length in columns:
            want = self._wanted.get(row)
            if want is not None:
                begin, end = max(start + 1, want.start), min(start + length + 1, want.prompt_len)
                if begin < end:
                    at = first + begin - 1 - start
                    hidden_LD = hidden_TD[at : at + end - begin]
                    scores = self._score(hidden_LD, row, begin, end, want.count)
                    found.append(PromptScores(row, begin, scores))
            first += length
        return found

    def _score(self, hidden_LD: Tensor, row: int, begin: int, end: int, count: int) -> LogprobColumns:
        target_L = self._history_RM[row, begin:end].long()
        parts = [
            compute_prompt_logprobs(self._model.compute_logits(hidden), target, count)
            for hidden, target in zip(hidden_LD.split(_LOGIT_ROWS), target_L.split(_LOGIT_ROWS), strict=True)
        ]
        return LogprobColumns(
            token_ids=torch.cat([part.token_ids for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            rank=torch.cat([part.rank for part in parts]),
        )
