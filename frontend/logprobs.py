"""Log-probability columns of the wire to the dicts, or columns, of the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tercet.frontend.flat_logprobs import FlatLogprobs, Logprob, PromptLogprobs, SampleLogprobs
from tercet.ipc import messages


class LogprobsReader:
    """Reads what one request asked for.

    Args:
        num_logprobs: entries beside the chosen token; what the wire has beyond is cut.
        decode_token: text of a token on its own; None where there is no tokenizer.
        flat: give columns (`FlatLogprobs`) in place of a list of dicts.
    """

    __slots__ = ("_decode_token", "_flat", "_num_logprobs")

    def __init__(
        self, num_logprobs: int, decode_token: Callable[[int], str] | None, flat: bool = False
    ) -> None:
        self._num_logprobs = num_logprobs
        self._decode_token = decode_token
        self._flat = flat

    def no_entries(self) -> SampleLogprobs:
        """What an output without tokens has."""
        return FlatLogprobs() if self._flat else []

    def no_prompt_entries(self, num_tokens: int) -> PromptLogprobs:
        """What a prompt has before anything came: in columns only its first position, as the others follow."""
        if not self._flat:
            return [None] * num_tokens
        entries = FlatLogprobs()
        entries.append(None)
        return entries

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
        entries = self.no_entries()
        for row in zip(ids, values, ranks, strict=True):
            self._append(entries, *row)
        return entries, [row[0] for row in values]

    def prompt(
        self, columns: messages.PromptLogprobs, index: int, into: PromptLogprobs, num_tokens: int
    ) -> bool:
        """Put the entries of key `index` in their places; False if the columns are not consistent.

        Args:
            num_tokens: of the prompt.
        """
        offset, start = columns.offset.tolist(), columns.start.tolist()
        if len(offset) != len(columns.key) + 1 or len(start) != len(columns.key) or not _consistent(columns):
            return False
        begin, end, position = offset[index], offset[index + 1], start[index]
        if not (0 <= begin <= end <= len(columns.rank) and 1 <= position <= num_tokens - (end - begin)):
            return False
        width = 1 + self._num_logprobs
        ids, values = (
            columns.token_ids[begin:end, :width].tolist(),
            columns.logprobs[begin:end, :width].tolist(),
        )
        rows = list(zip(ids, values, columns.rank[begin:end].tolist(), strict=True))
        if not isinstance(into, FlatLogprobs):
            into[position : position + len(rows)] = [self._entry(*row) for row in rows]
            return True
        if position > len(into):
            return False  # a gap: positions come in order
        for row in rows[len(into) - position :]:  # computed anew after a preemption, the first may be known
            self._append(into, *row)
        return True

    def _append(
        self, entries: SampleLogprobs, token_ids: list[int], logprobs: list[float], rank: int
    ) -> None:
        if not isinstance(entries, FlatLogprobs):
            entries.append(self._entry(token_ids, logprobs, rank))
            return
        ranks = [rank, *range(1, len(token_ids))]
        if token_ids[0] in token_ids[1:]:
            again = token_ids.index(token_ids[0], 1)
            del token_ids[again], logprobs[again], ranks[again]
        decode = self._decode_token
        texts = [None] * len(ranks) if decode is None else map(decode, token_ids)
        entries.append_fast(token_ids, logprobs, ranks, texts)

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
