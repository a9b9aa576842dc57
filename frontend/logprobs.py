"""Log-probability columns of the wire to the dicts of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tercet.frontend.outputs import Logprob, PromptLogprobs, SampleLogprobs
from tercet.ipc import messages


class LogprobsReader:
    """Reads what one request asked for.

    Args:
        num_logprobs: entries beside the chosen token; what the wire has beyond is cut.
        decode_token: text of a token on its own; None where there is no tokenizer.
    """

    __slots__ = ("_decode_token", "_num_logprobs")

    def __init__(self, num_logprobs: int, decode_token: Callable[[int], str] | None) -> None:
        self._num_logprobs = num_logprobs
        self._decode_token = decode_token

    def sample(
        self, columns: messages.Logprobs | None, rows: Sequence[int], num_tokens: int
    ) -> tuple[SampleLogprobs, list[float]] | None:
        """Entries of `num_tokens` output tokens, from these rows, and the chosen tokens' log-probabilities.

        None if the columns are not those of as many tokens.
        """
        if columns is None or len(rows) != num_tokens or not _consistent(columns):
            return None
        width = 1 + self._num_logprobs
        ids, values = columns.token_ids[rows, :width].tolist(), columns.logprobs[rows, :width].tolist()
        ranks = columns.rank[rows].tolist()
        entries = [self._entry(*row) for row in zip(ids, values, ranks, strict=True)]
        return entries, [row[0] for row in values]

    def prompt(self, columns: messages.PromptLogprobs, index: int, into: PromptLogprobs) -> bool:
        """Put the entries of key `index` in their places; False if the columns are not consistent."""
        offset, start = columns.offset.tolist(), columns.start.tolist()
        if len(offset) != len(columns.key) + 1 or len(start) != len(columns.key) or not _consistent(columns):
            return False
        begin, end, position = offset[index], offset[index + 1], start[index]
        if not (0 <= begin <= end <= len(columns.rank) and 1 <= position <= len(into) - (end - begin)):
            return False
        width = 1 + self._num_logprobs
        ids, values = (
            columns.token_ids[begin:end, :width].tolist(),
            columns.logprobs[begin:end, :width].tolist(),
        )
        ranks = columns.rank[begin:end].tolist()
        for i, row in enumerate(zip(ids, values, ranks, strict=True)):
            into[position + i] = self._entry(*row)
        return True

    def _entry(self, token_ids: list[int], logprobs: list[float], rank: int) -> dict[int, Logprob]:
        decode = self._decode_token
        entry: dict[int, Logprob] = {}
        for place, (token_id, logprob) in enumerate(zip(token_ids, logprobs, strict=True)):
            if token_id not in entry:  # the chosen token comes first, and again if it is among the best
                text = decode(token_id) if decode is not None else None
                entry[token_id] = Logprob(logprob, place or rank, text)
        return entry


def _consistent(columns: messages.Logprobs | messages.PromptLogprobs) -> bool:
    shape = columns.token_ids.shape
    return (
        len(shape) == 2
        and shape[1] >= 1
        and columns.logprobs.shape == shape
        and columns.rank.shape == shape[:1]
    )
