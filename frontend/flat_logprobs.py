"""Log-probabilities as a user gets them: a dict for each position, or all positions in a few long lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, overload

import msgspec


class Logprob(msgspec.Struct, gc=False):
    """Log-probability of one token at one position.

    Attributes:
        logprob: natural logarithm of the probability.
        rank: 1 is the most likely token; None where it is not known.
        decoded_token: the token's text on its own; None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """A sequence of dicts, token id -> Logprob, held as columns (`SamplingParams.flat_logprobs`).

    It is six lists of plain values, however many positions and tokens there are: nothing for the garbage
    collector to walk through. A dict is made when its position is looked at; changing it changes nothing here.
    The first position of a prompt, which nothing precedes, is an empty dict.

    Attributes:
        start_indices, end_indices: for each position, its range in the other columns.
        token_ids, logprobs, ranks, decoded_tokens: for each entry, the token and what a `Logprob` has of it.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> dict[int, Logprob] | FlatLogprobs:
        if not isinstance(index, slice):
            return self._entry(self.start_indices[index], self.end_indices[index])
        positions = range(*index.indices(len(self)))
        if positions.step == 1:
            return self._between(positions.start, max(positions.start, positions.stop))
        picked = FlatLogprobs()
        picked.extend(self[position] for position in positions)
        return picked

    def __iter__(self) -> Iterator[dict[int, Logprob]]:
        return map(self._entry, self.start_indices, self.end_indices)

    def append(self, entry: Mapping[int, Logprob] | None) -> None:
        """Add a position; None, for one without log-probabilities, is an empty one."""
        entry = entry or {}
        values = entry.values()
        self.append_fast(
            entry,
            (value.logprob for value in values),
            (value.rank for value in values),
            (value.decoded_token for value in values),
        )

    def append_fast(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """Add a position from its columns, which are of equal length. Token ids are distinct."""
        self.start_indices.append(len(self.token_ids))
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.ranks.extend(ranks)
        self.decoded_tokens.extend(decoded_tokens)
        self.end_indices.append(len(self.token_ids))

    def extend(self, entries: Iterable[Mapping[int, Logprob] | None]) -> None:
        """Add positions, from columns without a detour where they come as such."""
        if not isinstance(entries, FlatLogprobs):
            for entry in entries:
                self.append(entry)
            return
        offset = len(self.token_ids)
        starts, ends = entries.start_indices, entries.end_indices
        self.start_indices += [start + offset for start in starts]
        self.end_indices += [end + offset for end in ends]
        self.token_ids += entries.token_ids
        self.logprobs += entries.logprobs
        self.ranks += entries.ranks
        self.decoded_tokens += entries.decoded_tokens

    def _entry(self, start: int, end: int) -> dict[int, Logprob]:
        columns = (self.logprobs[start:end], self.ranks[start:end], self.decoded_tokens[start:end])
        return dict(zip(self.token_ids[start:end], map(Logprob, *columns), strict=True))

    def _between(self, first: int, last: int) -> FlatLogprobs:
        """Positions first to last - 1. Positions follow each other in the columns without a gap."""
        starts, ends = self.start_indices[first:last], self.end_indices[first:last]
        begin, end = (starts[0], ends[-1]) if starts else (0, 0)
        return FlatLogprobs(
            [start - begin for start in starts],
            [stop - begin for stop in ends],
            self.token_ids[begin:end],
            self.logprobs[begin:end],
            self.ranks[begin:end],
            self.decoded_tokens[begin:end],
        )


SampleLogprobs: TypeAlias = list[dict[int, Logprob]] | FlatLogprobs
"""For each output token: token id -> Logprob, the chosen token first, then the most likely, best first."""

PromptLogprobs: TypeAlias = list[dict[int, Logprob] | None] | FlatLogprobs
"""The same for each token of the prompt; the first, which nothing precedes, has None (in columns: nothing)."""
