"""What single tokens turn into: the decoder of a tokenizer analysed once, and tables from token id to text.

A tokenizer's decoder is a chain of stages. Whether text can be streamed token by token is read off that chain
(`plan_decoder`); what a token contributes is then asked of the library's own decoder, one token at a time and
only when the token is first seen (a vocabulary has up to some 260,000, a request uses a few hundred).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import tokenizers

from tercet.frontend.byte_tables import REPLACEMENT, token_bytes

# Put before a token so that the decoder does not treat it as the first of the text. Chains that would change
# this very letter are not taken apart (`plan_decoder` tries it).
_ANCHOR = "a"
# "+A" is a number too: the library parses with Rust's from_str_radix.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f+][0-9A-Fa-f]>")
_BYTE_TOKEN_CHARS = frozenset("<0x>+123456789ABCDEFabcdef")


class DecoderKind(Enum):
    """How a decoder's text can be streamed; see `tercet.frontend.detokenizer` for what each holds back."""

    BYTE_LEVEL = auto()
    PIECES = auto()  # one text per token, apart from the first token and runs of byte tokens
    SUFFIX = auto()  # the last token is written differently
    HELD = auto()  # nothing is known before the end


@dataclass(frozen=True, slots=True)
class DecoderPlan:
    """A decoder chain, as far as streaming is concerned.

    Attributes:
        kind: which detokenizer can stream it.
        byte_fallback: runs of <0xNN> tokens are UTF-8 bytes (PIECES).
        first_differs: the first token of a text is written differently (PIECES).
        joins_with_space: the decoder separates tokens by spaces (PIECES).
        strip_left, strip_char: up to so many leading characters of the whole text are dropped (PIECES).
        suffix: end-of-word mark (SUFFIX).
    """

    kind: DecoderKind
    byte_fallback: bool = False
    first_differs: bool = False
    joins_with_space: bool = False
    strip_left: int = 0
    strip_char: str = " "
    suffix: str = ""


_HELD = DecoderPlan(DecoderKind.HELD)
_NO_DECODER = DecoderPlan(DecoderKind.PIECES, first_differs=True, joins_with_space=True)


def plan_decoder(backend: tokenizers.Tokenizer) -> DecoderPlan:
    """Find out how the text of this tokenizer can be streamed."""
    if backend.decoder is None:
        return _NO_DECODER
    stages = _flatten(json.loads(backend.decoder.__getstate__()))
    while stages and stages[-1]["type"] == "Fuse" and (len(stages) < 2 or stages[-2]["type"] == "Fuse"):
        stages.pop()
    kinds = [stage["type"] for stage in stages]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return DecoderPlan(DecoderKind.BYTE_LEVEL)
    if kinds in (["BPEDecoder"], ["BPEDecoder", "Fuse"]):
        return DecoderPlan(DecoderKind.SUFFIX, suffix=stages[0]["suffix"])
    if backend.decoder.decode([_ANCHOR]) != _ANCHOR:
        return _HELD
    return _plan_pieces(stages)


def _flatten(stage: dict[str, Any]) -> list[dict[str, Any]]:
    if stage["type"] != "Sequence":
        return [stage]
    return [leaf for inner in stage["decoders"] for leaf in _flatten(inner)]


def _plan_pieces(stages: list[dict[str, Any]]) -> DecoderPlan:
    """Accepts per-token stages, ByteFallback, Fuse and a Strip at the left, in this order, each optional."""
    rest = list(stages)
    strip_left, strip_char = 0, " "
    if len(rest) > 1 and rest[-1]["type"] == "Strip" and rest[-2]["type"] == "Fuse":
        strip = rest.pop()
        if strip["stop"]:
            return _HELD
        strip_left, strip_char = strip["start"], strip["content"]
    if rest and rest[-1]["type"] == "Fuse":
        rest.pop()
    byte_fallback = bool(rest) and rest[-1]["type"] == "ByteFallback"
    if byte_fallback:
        rest.pop()
    kinds = {stage["type"] for stage in rest}
    if not kinds <= {"Replace", "Strip", "Metaspace", "WordPiece"}:
        return _HELD
    first_differs = bool(kinds & {"Metaspace", "WordPiece"})
    if first_differs and (byte_fallback or strip_left):
        return _HELD
    if byte_fallback and not all(_spares_byte_tokens(stage) for stage in rest):
        return _HELD
    return DecoderPlan(
        DecoderKind.PIECES,
        byte_fallback=byte_fallback,
        first_differs=first_differs,
        joins_with_space="WordPiece" in kinds,
        strip_left=strip_left,
        strip_char=strip_char,
    )


def _spares_byte_tokens(stage: dict[str, Any]) -> bool:
    """Whether the stage neither makes nor breaks <0xNN> tokens."""
    if stage["type"] != "Replace":
        return False
    pattern, content = stage["pattern"].get("String", ""), stage["content"]
    return bool(pattern) and not (set(pattern) | set(content)) & _BYTE_TOKEN_CHARS


class TokenLookup:
    """Token id -> token string, or None for ids that decoding leaves out.

    Args:
        backend: the tokenizer.
        skip_special_tokens: leave out added tokens that are marked special.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        added = backend.get_added_tokens_decoder()
        self._id_to_token: Callable[[int], str | None] = backend.id_to_token
        # By content, as the library does: a vocabulary entry spelled like a special token is skipped as well.
        self._skipped = {token.content for token in added.values() if token.special and skip_special_tokens}

    def __call__(self, token_id: int) -> str | None:
        token = self._id_to_token(token_id)
        return None if token in self._skipped else token


class ByteLevelTable(dict[int, str | bytes]):
    """Token id -> its text if that is whole characters, else its bytes. Filled as tokens are seen."""

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._lookup = TokenLookup(backend, skip_special_tokens)

    def __missing__(self, token_id: int) -> str | bytes:
        token = self._lookup(token_id)
        if token is None:
            return ""  # not stored: ids outside the vocabulary must not make the table grow
        data = token_bytes(token)
        piece: str | bytes
        try:
            piece = data.decode("utf-8")
        except UnicodeDecodeError:
            piece = data
        self[token_id] = piece
        return piece


class PieceTable(dict[int, str | int | None]):
    """Token id -> its text when not first, its byte (byte fallback), or None if decoding leaves it out.

    Attributes:
        plan: the decoder that it belongs to.
        added_ids: ids of added tokens if the space that the decoder puts between two of them is unwanted,
            else empty.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        plan: DecoderPlan,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.added_ids: frozenset[int] = frozenset()
        if plan.joins_with_space and not spaces_between_special_tokens:
            self.added_ids = frozenset(backend.get_added_tokens_decoder())
        self._decoder = backend.decoder
        self._lookup = TokenLookup(backend, skip_special_tokens)

    def __missing__(self, token_id: int) -> str | int | None:
        token = self._lookup(token_id)
        if token is None:
            return None
        piece: str | int
        if self.plan.byte_fallback and _BYTE_TOKEN.fullmatch(token):
            piece = int(token[3:5], 16)
        elif self._decoder is None:
            piece = " " + token
        else:
            piece = self._decoder.decode([_ANCHOR, token])[len(_ANCHOR) :]
        self[token_id] = piece
        return piece

    def first_piece(self, token_id: int) -> str:
        """Text of the token as the first of a text."""
        token = self._lookup(token_id)
        if token is None:
            return ""
        text: str = token if self._decoder is None else self._decoder.decode([token])
        return text


class SuffixTable(dict[int, tuple[str, str, str] | None]):
    """Token id -> (text that is certain, rest if a token follows, rest if none does); None if left out."""

    def __init__(self, backend: tokenizers.Tokenizer, plan: DecoderPlan, skip_special_tokens: bool) -> None:
        super().__init__()
        self._suffix = plan.suffix
        self._lookup = TokenLookup(backend, skip_special_tokens)

    def __missing__(self, token_id: int) -> tuple[str, str, str] | None:
        token = self._lookup(token_id)
        if token is None:
            return None
        certain = token.partition(self._suffix)[0] if self._suffix else ""
        followed = token.replace(self._suffix, " ")[len(certain) :]
        last = token.replace(self._suffix, "")[len(certain) :]
        self[token_id] = (certain, followed, last)
        return certain, followed, last


def byte_run_text(run: bytes | bytearray) -> str:
    """Text of a whole run of byte-fallback tokens: its UTF-8, or one U+FFFD a byte if any is malformed."""
    try:
        return run.decode("utf-8")
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)
