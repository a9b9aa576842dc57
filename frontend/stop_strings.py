"""Stop strings: found across token and chunk edges, and no part of one is shown before it is decided.

`StopStrings` is the set of a request, compiled; `OutputText` is what a request's stream talks to: tokens in,
text to show out, and where to stop. Neither knows messages or finish reasons.

Of several matches the one that is complete first wins, and of those that are complete with the same character
the longest. So the outcome does not depend on how the tokens were chunked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

from tercet.errors import ValidationError
from tercet.frontend.detokenizer import Detokenizer
from tercet.frontend.validation import MAX_STOP_STRING_CHARS


class StopMatch(NamedTuple):
    """A complete stop string: it ends before `end` in the scanned text and is `stop_string`."""

    end: int
    stop_string: str


class StopStrings:
    """Stop strings compiled for matching character by character (Knuth, Morris, Pratt 1977). Immutable.

    Args:
        strings: at least one, none empty, each at most MAX_STOP_STRING_CHARS long.

    Raises:
        ValidationError: names `stop` and what is wrong with it.
    """

    __slots__ = ("_failures", "_first_char", "first_chars", "strings")

    def __init__(self, strings: Sequence[str]) -> None:
        if not strings:
            raise ValidationError("stop", "is empty; leave it out to have no stop strings")
        for string in strings:
            if not string:
                raise ValidationError("stop", "holds an empty string, which would stop every request at once")
            if len(string) > MAX_STOP_STRING_CHARS:
                raise ValidationError(
                    "stop", f"holds a string of {len(string)} characters; at most {MAX_STOP_STRING_CHARS}"
                )
        # Longest first: of matches that end together the first one checked is the longest.
        self.strings = tuple(sorted(set(strings), key=len, reverse=True))
        self._failures = tuple(_failure_function(string) for string in self.strings)
        self.first_chars = frozenset(string[0] for string in self.strings)
        self._first_char = re.compile("[" + re.escape("".join(sorted(self.first_chars))) + "]")

    def start(self) -> list[int]:
        """Initial state of a scan: for each stop string, how many of its characters the text ends with."""
        return [0] * len(self.strings)

    def scan(self, state: list[int], text: str, ignore_matches: bool = False) -> StopMatch | None:
        """Advance `state` over `text` up to the first complete match.

        Args:
            state: from `start`, changed in place. `max(state)` is how many characters at the end of the text
                may yet become a match.
            text: what follows the text scanned so far.
            ignore_matches: read on over complete matches; the end of one may still begin another.
        """
        position = 0
        while position < len(text):
            if not any(state):
                found = self._first_char.search(text, position)
                if found is None:
                    return None
                position = found.start()
            matched = self._advance(state, text[position])
            position += 1
            if matched is not None and not ignore_matches:
                return StopMatch(position, matched)
        return None

    def _advance(self, state: list[int], char: str) -> str | None:
        matched: str | None = None
        for index, string in enumerate(self.strings):
            length, failure = state[index], self._failures[index]
            while length and string[length] != char:
                length = failure[length - 1]
            if string[length] == char:
                length += 1
            if length == len(string):
                matched = matched or string
                length = failure[length - 1]
            state[index] = length
        return matched


def _failure_function(string: str) -> tuple[int, ...]:
    """For each prefix of `string`: length of its longest proper prefix that is also its suffix."""
    failure = [0] * len(string)
    length = 0
    for index in range(1, len(string)):
        while length and string[index] != string[length]:
            length = failure[length - 1]
        if string[index] == string[length]:
            length += 1
        failure[index] = length
    return tuple(failure)


@functools.lru_cache(maxsize=256)
def compile_stop_strings(strings: tuple[str, ...]) -> StopStrings:
    """`StopStrings(strings)`, kept for the next request that has the same."""
    return StopStrings(strings)


class OutputText:
    """The text of one request as its client sees it: detokenized, cut at stop strings.

    Args:
        detokenizer: of this request; `OutputText` becomes its only user.
        stop: stop strings; empty for none.
        include_stop_str_in_output: keep the stop string that matched at the end of the text.
        min_tokens: matches completed by one of the first `min_tokens` tokens do not count.

    Attributes:
        append: the detokenizer's own. Without stop strings it is `push` of tokens that do not finish the
            request; with them nobody else may call it.
        stop_reason: the stop string that matched.

    Raises:
        ValidationError: a stop string is empty or too long.
    """

    __slots__ = (
        "_detokenizer",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_num_tokens",
        "_state",
        "_stop",
        "append",
        "stop_reason",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self.append = detokenizer.append
        self._stop = compile_stop_strings(tuple(stop)) if stop else None
        self._state = self._stop.start() if self._stop else []
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # the text's end, as far as it may be the beginning of a stop string
        self.stop_reason: str | None = None

    def push(
        self, token_ids: Sequence[int], finished: bool = False, *, ended_by_stop_token: bool = False
    ) -> tuple[str, str | None, int]:
        """Take the next tokens of the request.

        Args:
            token_ids: any number of them.
            finished: no more will come, so everything held back is decided.
            ended_by_stop_token: the last of `token_ids` is an EOS or stop token that finished the request; it
                is counted, and shown only with include_stop_str_in_output (vLLM's rule).

        Returns:
            (text to show next, the stop string that matched or None, how many of `token_ids` belong to the
            output). The last is below `len(token_ids)` only when a stop string matched before the end; the
            caller then aborts the request. After a match nothing more is taken or returned.
        """
        if self._stop is None and not finished:
            return self.append(token_ids), None, len(token_ids)
        if self.stop_reason is not None:
            return "", None, 0
        shown = token_ids[:-1] if ended_by_stop_token and not self._include_stop else token_ids
        if self._stop is None:
            return self.append(shown) + self._detokenizer.finish(), None, len(token_ids)
        delta, used = self._push_scanned(self._stop, shown)
        if self.stop_reason is None:
            used = len(token_ids)
            if finished:
                delta += self._finish_scanned(self._stop, used - len(shown))
        return delta, self.stop_reason, used

    def push_token(self, token_id: int) -> str:
        """`push` of one token that does not finish the request: the text to show next. A match is told by
        `stop_reason`; it must be None before."""
        delta = self.append((token_id,))
        stop = self._stop
        if stop is not None:
            self._num_tokens += 1
            if self._held or not stop.first_chars.isdisjoint(delta):  # most tokens begin no stop string
                return self._scan(stop, delta)
        return delta

    def _push_scanned(self, stop: StopStrings, token_ids: Sequence[int]) -> tuple[str, int]:
        """Token by token, so that a match can be told to the token that completed it."""
        out = []
        for used, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            out.append(self._scan(stop, self.append((token_id,))))
            if self.stop_reason is not None:
                return "".join(out), used
        return "".join(out), len(token_ids)

    def _finish_scanned(self, stop: StopStrings, num_hidden_tokens: int) -> str:
        self._num_tokens += num_hidden_tokens
        delta = self._scan(stop, self._detokenizer.finish())
        if self.stop_reason is None:
            delta, self._held = delta + self._held, ""
        return delta

    def _scan(self, stop: StopStrings, text: str) -> str:
        """The part of the held text and `text` that is now decided; sets `stop_reason` on a match."""
        if not text:
            return ""
        match = stop.scan(self._state, text, ignore_matches=self._num_tokens <= self._min_tokens)
        known = self._held + text
        if match is None:
            decided = len(known) - max(self._state)
            self._held = known[decided:]
            return known[:decided]
        self.stop_reason = match.stop_string
        end = len(self._held) + match.end
        self._held = ""
        return known[: end if self._include_stop else end - len(match.stop_string)]
