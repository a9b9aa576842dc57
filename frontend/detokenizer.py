"""Incremental detokenizing: token ids in, text that is final out.

Owns one promise: for any chunking of the tokens, the concatenated deltas equal the one-shot decode of the
`tokenizers` library byte for byte, and no character is ever taken back. Text that later tokens could still
change is held back until it is decided or the request finishes. The work per token is constant for every
kind of decoder. Does not know stop strings (`stop_strings`), requests or messages.

What is held back, by kind of decoder:

    byte-level (GPT-2, Llama 3, Qwen, SmolLM)     an incomplete UTF-8 character
    byte fallback (Llama 2, Mistral, Gemma)       a run of <0xNN> tokens: the library decodes it as a whole,
                                                  one bad byte turns all of it into U+FFFD
    Metaspace, WordPiece, none (Unigram, BERT)    nothing
    BPE with an end-of-word suffix                the last token's suffix
    any other chain (CTC, Replace after Fuse, …)  everything until the end: exact, but not streamed

Text in the context of a prompt: let D be the one-shot decode, P the prompt's ids and O the output's. Without
a prompt the text is D(O). With one it is D(P+O) less its longest common prefix with D(P): a leading space
that D(O) would drop is kept ("▁Hello" after a prompt reads " Hello"), and a character that the prompt began
and the output completes is in the text whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import tokenizers

from tercet.frontend.byte_tables import REPLACEMENT, decode_utf8_stream, incomplete_utf8_suffix
from tercet.frontend.detokenizer_tables import (
    ByteLevelTable,
    DecoderKind,
    PieceTable,
    SuffixTable,
    byte_run_text,
    plan_decoder,
)


class HasBackend(Protocol):
    """A tokenizer built on the `tokenizers` library, as `tercet.frontend.tokenizer.Tokenizer` is."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer."""


class Detokenizer:
    """The text of one request, growing. Made by `DetokenizerFactory.create`; for one thread at a time."""

    __slots__ = ("_context_tail", "_finished")

    def __init__(self) -> None:
        # What D(P) holds beyond the text that P alone decides; dropped from the front of our own text.
        self._context_tail = ""
        self._finished = False

    def append(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens (any number) and return the text that they decide.

        Ids that the vocabulary lacks have no text.

        Raises:
            OverflowError: a token id is negative or beyond 32 bits.
        """
        return self._release(self._decode(token_ids))

    def finish(self) -> str:
        """Return the text still held back, as the one-shot decode renders it. Must be the last call."""
        if self._finished:
            return ""
        self._finished = True
        return self._release(self._flush())

    def _decode(self, token_ids: Sequence[int]) -> str:
        raise NotImplementedError

    def _flush(self) -> str:
        raise NotImplementedError

    def _release(self, delta: str) -> str:
        if delta and self._context_tail:
            delta = _without_common_prefix(delta, self._context_tail)
            self._context_tail = ""
        return delta


def _without_common_prefix(text: str, other: str) -> str:
    length = 0
    for ours, theirs in zip(text, other, strict=False):
        if ours != theirs:
            break
        length += 1
    return text[length:]


class _ByteLevelDetokenizer(Detokenizer):
    """Tokens are byte strings; the text is their UTF-8, with U+FFFD for what is malformed."""

    __slots__ = ("_pending", "_table")

    def __init__(self, table: ByteLevelTable, prompt_token_ids: Sequence[int]) -> None:
        super().__init__()
        self._table = table
        self._pending = self._incomplete_end(prompt_token_ids)  # the start of one character, at most 3 bytes
        if self._pending:
            self._context_tail = REPLACEMENT

    def append(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1:  # the common cases, kept short
            piece = self._table[token_ids[0]]
            if isinstance(piece, bytes):
                text, self._pending = decode_utf8_stream(self._pending + piece)
                return self._release(text)
            if not self._pending:
                return piece
        return self._release(self._decode(token_ids))

    def _decode(self, token_ids: Sequence[int]) -> str:
        table, pending, out = self._table, self._pending, []
        for token_id in token_ids:
            piece = table[token_id]
            if isinstance(piece, bytes):
                text, pending = decode_utf8_stream(pending + piece)
                out.append(text)
            elif piece:
                if pending:  # cut off by a new character: one U+FFFD for its longest valid prefix
                    out.append(REPLACEMENT)
                    pending = b""
                out.append(piece)
        self._pending = pending
        return "".join(out)

    def _flush(self) -> str:
        pending, self._pending = self._pending, b""
        return REPLACEMENT if pending else ""

    def _incomplete_end(self, prompt_token_ids: Sequence[int]) -> bytes:
        """The prompt's last bytes if they begin a character without ending it. Reads only the last tokens."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            piece = self._table[token_id]
            tail = (piece if isinstance(piece, bytes) else piece.encode()) + tail
            if len(tail) >= 3:
                break
        return incomplete_utf8_suffix(tail)


class _PieceDetokenizer(Detokenizer):
    """Each token has a text of its own: one if it comes first, one elsewhere.

    A byte-fallback token has a byte instead; a run of them is decoded when it ends.
    """

    __slots__ = ("_previous_added", "_run", "_started", "_streaming", "_strip_left", "_table")

    def __init__(self, table: PieceTable, prompt_token_ids: Sequence[int]) -> None:
        super().__init__()
        self._table = table
        self._run = bytearray()  # bytes of the open run of byte tokens
        self._strip_left = table.plan.strip_left  # characters that may still be stripped at the text's start
        self._started = not table.plan.first_differs
        self._previous_added = False
        self._prime(prompt_token_ids)
        self._streaming = self._is_streaming()

    def append(self, token_ids: Sequence[int]) -> str:
        if self._streaming and len(token_ids) == 1:
            piece = self._table[token_ids[0]]
            if isinstance(piece, str):
                return piece
        text = self._decode(token_ids)
        self._streaming = self._is_streaming()
        return self._release(text)

    def _is_streaming(self) -> bool:
        """Whether the next token's text depends on nothing before it."""
        return self._started and not (self._run or self._strip_left or self._table.added_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        table, run, out = self._table, self._run, []
        for token_id in token_ids:
            piece = table[token_id]
            if isinstance(piece, int):
                run.append(piece)
            elif piece is not None:
                if run:
                    out.append(byte_run_text(run))
                    run.clear()
                out.append(self._in_place(token_id, piece))
        return self._strip("".join(out))

    def _in_place(self, token_id: int, piece: str) -> str:
        """The token's text where it stands: first or later, after an added token or not."""
        if not self._started:
            self._started = True
            piece = self._table.first_piece(token_id)
        elif self._previous_added and token_id in self._table.added_ids and piece.startswith(" "):
            piece = piece[1:]
        self._previous_added = token_id in self._table.added_ids
        return piece

    def _strip(self, text: str) -> str:
        if not self._strip_left or not text:
            return text
        limit = min(len(text), self._strip_left)
        cut = 0
        while cut < limit and text[cut] == self._table.plan.strip_char:
            cut += 1
        self._strip_left = self._strip_left - cut if cut == len(text) else 0
        return text[cut:]

    def _flush(self) -> str:
        text = byte_run_text(self._run)
        self._run.clear()
        return self._strip(text)

    def _prime(self, prompt_token_ids: Sequence[int]) -> None:
        """Reach the state that decoding the prompt leaves, reading only its first and last few tokens."""
        index = 0
        while index < len(prompt_token_ids) and not (self._started and not self._strip_left):
            self._decode(prompt_token_ids[index : index + 1])
            index += 1
        self._decode(prompt_token_ids[max(index, self._start_of_last_run(prompt_token_ids)) :])
        if self._run:
            state = bytes(self._run), self._strip_left
            self._context_tail = self._flush()
            self._run[:], self._strip_left = state

    def _start_of_last_run(self, prompt_token_ids: Sequence[int]) -> int:
        """Index of the last token with a text of its own: only byte tokens and skipped ones follow it."""
        for index in range(len(prompt_token_ids) - 1, -1, -1):
            if isinstance(self._table[prompt_token_ids[index]], str):
                return index
        return 0


class _SuffixDetokenizer(Detokenizer):
    """The end-of-word mark reads as a space if a token follows, and as nothing at the end."""

    __slots__ = ("_if_followed", "_if_last", "_table")

    def __init__(self, table: SuffixTable, prompt_token_ids: Sequence[int]) -> None:
        super().__init__()
        self._table = table
        self._if_followed = self._if_last = ""
        for token_id in reversed(prompt_token_ids):
            if table[token_id] is not None:
                self._decode((token_id,))
                self._context_tail = self._if_last
                break

    def _decode(self, token_ids: Sequence[int]) -> str:
        out = []
        for token_id in token_ids:
            piece = self._table[token_id]
            if piece is not None:
                out.append(self._if_followed)
                certain, self._if_followed, self._if_last = piece
                out.append(certain)
        return "".join(out)

    def _flush(self) -> str:
        return self._if_last


class _HeldDetokenizer(Detokenizer):
    """For decoders that cannot be taken apart: one decode, at the end."""

    __slots__ = ("_backend", "_num_prompt_tokens", "_skip_special_tokens", "_token_ids")

    def __init__(
        self, backend: tokenizers.Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        super().__init__()
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._token_ids = list(prompt_token_ids)
        self._num_prompt_tokens = len(self._token_ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        self._token_ids.extend(token_ids)
        return ""

    def _flush(self) -> str:
        self._context_tail = self._decode_all(self._token_ids[: self._num_prompt_tokens])
        return self._decode_all(self._token_ids)

    def _decode_all(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer; the tables that they share live here.

    Args:
        tokenizer: what encoded the prompts. Its added tokens must not change afterwards.
    """

    def __init__(self, tokenizer: HasBackend) -> None:
        self._backend = tokenizer.backend
        self._plan = plan_decoder(self._backend)
        self._byte_level: dict[bool, ByteLevelTable] = {}
        self._pieces: dict[tuple[bool, bool], PieceTable] = {}
        self._suffixes: dict[bool, SuffixTable] = {}

    @property
    def kind(self) -> DecoderKind:
        """How this tokenizer's text is streamed."""
        return self._plan.kind

    def create(
        self,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> Detokenizer:
        """Make the detokenizer of one request.

        Args:
            skip_special_tokens: leave out added tokens marked special.
            spaces_between_special_tokens: if False, decoders that join tokens with spaces (WordPiece, or no
                decoder) put none between two neighbouring added tokens. Without effect when special
                tokens are skipped, as in vLLM.
            prompt_token_ids: context for the first output tokens (see the module's docstring); only its ends
                are read, except by decoders that hold everything back.
        """
        plan, backend, skip = self._plan, self._backend, skip_special_tokens
        if plan.kind is DecoderKind.BYTE_LEVEL:
            if skip not in self._byte_level:
                self._byte_level[skip] = ByteLevelTable(backend, skip)
            return _ByteLevelDetokenizer(self._byte_level[skip], prompt_token_ids)
        if plan.kind is DecoderKind.PIECES:
            key = skip, spaces_between_special_tokens or skip
            if key not in self._pieces:
                self._pieces[key] = PieceTable(backend, plan, *key)
            return _PieceDetokenizer(self._pieces[key], prompt_token_ids)
        if plan.kind is DecoderKind.SUFFIX:
            if skip not in self._suffixes:
                self._suffixes[skip] = SuffixTable(backend, plan, skip)
            return _SuffixDetokenizer(self._suffixes[skip], prompt_token_ids)
        return _HeldDetokenizer(backend, skip, prompt_token_ids)
