"""Log-probabilities in the two forms that OpenAI's responses have, from the engine's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tercet.frontend.flat_logprobs import Logprob
from tercet.frontend.server.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from tercet.frontend.server.token_bytes import BytesOf

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say: a token that was excluded."""


def finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)


def token_text(token_id: int, logprob: Logprob, as_id: bool) -> str:
    """A token's name: its text, or `token_id:17` where that is asked for or there is no text."""
    if as_id or logprob.decoded_token is None:
        return f"token_id:{token_id}"
    return logprob.decoded_token


def chat_logprobs(
    entries: Sequence[Mapping[int, Logprob]], num_top: int, *, as_ids: bool, bytes_of: BytesOf
) -> ChatLogprobs:
    """
    Args:
        entries: for each token, the chosen one first.
        num_top: `top_logprobs`.
        as_ids: name tokens by their ids.
        bytes_of: looks up the bytes of tokens.
    """
    return ChatLogprobs([_chat_token(entry, num_top, as_ids, bytes_of) for entry in entries])


def _chat_token(
    entry: Mapping[int, Logprob], num_top: int, as_ids: bool, bytes_of: BytesOf
) -> ChatTokenLogprob:
    token_id, chosen = next(iter(entry.items()))
    token = token_text(token_id, chosen, as_ids)
    top = []
    for other_id, logprob in best(entry, num_top):
        name = token_text(other_id, logprob, as_ids)
        data = bytes_of(other_id, logprob.decoded_token or "")
        top.append(TopLogprob(name, finite(logprob.logprob), list(data)))
    data = bytes_of(token_id, chosen.decoded_token or "")
    return ChatTokenLogprob(token, finite(chosen.logprob), list(data), top)


def best(entry: Mapping[int, Logprob], num_top: int) -> list[tuple[int, Logprob]]:
    """The most likely tokens of a position, best first."""
    ranked = [(token_id, logprob) for token_id, logprob in entry.items() if (logprob.rank or 0) <= num_top]
    ranked.sort(key=lambda item: item[1].rank or 0)
    return ranked


class CompletionLogprobsBuilder:
    """Columns of a completion; offsets go on from call to call.

    Args:
        num_top: `logprobs` of the request.
        decode: text of one token, for positions without an entry.
    """

    def __init__(self, num_top: int, *, as_ids: bool, decode: Callable[[int], str] | None) -> None:
        self._num_top = num_top
        self._as_ids = as_ids
        self._decode = decode
        self._offset = 0

    def build(
        self, token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None]
    ) -> CompletionLogprobs:
        """The next tokens. The chosen token is among `top_logprobs` even where it is not one of the best."""
        columns = CompletionLogprobs([], [], [], [])
        for token_id, entry in zip(token_ids, entries, strict=True):
            columns.text_offset.append(self._offset)
            if not entry:  # the first token of a prompt: nothing precedes it
                text = self._name(token_id)
                columns.token_logprobs.append(None)
                columns.top_logprobs.append(None)
            else:
                chosen = entry[token_id]
                text = token_text(token_id, chosen, self._as_ids)
                columns.token_logprobs.append(finite(chosen.logprob))
                columns.top_logprobs.append(self._top(token_id, entry))
            columns.tokens.append(text)
            self._offset += len(text)
        return columns

    def _top(self, token_id: int, entry: Mapping[int, Logprob]) -> dict[str, float]:
        top = best(entry, self._num_top)
        if all(other != token_id for other, _ in top):
            top.append((token_id, entry[token_id]))
        return {token_text(other, logprob, self._as_ids): finite(logprob.logprob) for other, logprob in top}

    def _name(self, token_id: int) -> str:
        if self._as_ids or self._decode is None:
            return f"token_id:{token_id}"
        return self._decode(token_id)


def prompt_logprobs_json(entries: Sequence[Mapping[int, Logprob] | None]) -> list[Any]:
    """vLLM's `prompt_logprobs`: token id -> logprob, rank, decoded_token; null at the first position."""
    return [
        None
        if not entry
        else {
            str(token_id): {
                "logprob": finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in entry.items()
        }
        for entry in entries
    ]
