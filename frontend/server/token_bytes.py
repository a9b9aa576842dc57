"""The bytes that a token stands for, which its text alone may not tell: half a character has none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeAlias

from tercet.frontend.detokenizer_tables import ByteLevelTable, DecoderKind, plan_decoder
from tercet.frontend.tokenizer import Tokenizer

BytesOf: TypeAlias = Callable[[int, str], bytes]
"""Token id and text -> bytes."""

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def bytes_of_text(token_id: int, text: str) -> bytes:
    """For an engine without a tokenizer, and for tokens that are text."""
    return text.encode()


def make_bytes_of(tokenizer: Tokenizer) -> BytesOf:
    """The look-up for a tokenizer whose tokens are bytes, or may be."""
    plan = plan_decoder(tokenizer.backend)
    if plan.kind is DecoderKind.BYTE_LEVEL:
        table = ByteLevelTable(tokenizer.backend, skip_special_tokens=False)

        def byte_level(token_id: int, text: str) -> bytes:
            piece = table[token_id]
            return piece if isinstance(piece, bytes) else piece.encode()

        return byte_level
    if not plan.byte_fallback:
        return bytes_of_text

    def byte_fallback(token_id: int, text: str) -> bytes:
        match = _BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(token_id) or "")
        return bytes.fromhex(match[1]) if match is not None else text.encode()

    return byte_fallback
