"""Bytes and characters: the byte alphabet of byte-level BPE, and UTF-8 that arrives in pieces.

The alphabet has one printable character for each of the 256 bytes; byte-level vocabularies are written in it.

Source: Radford et al. 2019 (GPT-2), `bytes_to_unicode`: a printable Latin-1 byte stands for itself,
the others take U+0100, U+0101, … in the order of the bytes.
"""

import codecs
import functools


def _byte_to_char() -> tuple[str, ...]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    chars: list[str] = []
    next_free = 0x100
    for byte in range(256):
        if byte in printable:
            chars.append(chr(byte))
        else:
            chars.append(chr(next_free))
            next_free += 1
    return tuple(chars)


BYTE_TO_CHAR: tuple[str, ...] = _byte_to_char()
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def token_bytes(token: str) -> bytes:
    """Bytes that a byte-level token stands for.

    A token with a character outside the alphabet (an added token such as "<｜end｜>") stands for its own
    UTF-8 bytes, as in the `tokenizers` library's ByteLevel decoder.
    """
    try:
        return bytes([CHAR_TO_BYTE[char] for char in token])
    except KeyError:
        return token.encode("utf-8")


REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@functools.lru_cache(8192)  # a text repeats its characters, and the codec takes 10 times a look-up
def decode_utf8_stream(data: bytes) -> tuple[str, bytes]:
    """Decode all of `data` that is decided: (text, incomplete character at the end, at most 3 bytes).

    Each maximal malformed part becomes one U+FFFD (Unicode 3.9, "substitution of maximal subparts"), which is
    what the `tokenizers` library does too.
    """
    text, used = codecs.utf_8_decode(data, "replace", False)
    rest = data[used:]
    if len(rest) == 2 and rest[0] == 0xED and rest[1] >= 0xA0:
        # Half a surrogate: CPython waits for the rest (for its surrogatepass mode), but no byte can mend it.
        return text + REPLACEMENT * 2, b""
    return text, rest


def incomplete_utf8_suffix(data: bytes) -> bytes:
    """The bytes at the end of `data` that begin a character without ending it; empty when there are none."""
    for length in (3, 2, 1):
        suffix = data[-length:]
        if suffix and decode_utf8_stream(suffix) == ("", suffix):
            return suffix
    return b""
