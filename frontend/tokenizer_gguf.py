"""A GGUF file's tokenizer as a tokenizer.json and the files beside it.

Handles byte-level BPE (`tokenizer.ggml.model` = gpt2) and SentencePiece BPE (llama). The JSON is written
directly, without building a tokenizer first, so a conversion takes a few tenths of a second; the result is
cached by the file's content.

Source: GGUF specification, section "Tokenizer" (ggml `docs/gguf.md`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from tercet.errors import UnsupportedModelError
from tercet.frontend.pre_tokenizers import JSONObject, PreTokenizer, pre_tokenizer_for
from tercet.frontend.tokenizer_bundle import DEFAULT_TEMPLATE, TokenizerBundle
from tercet.frontend.tokenizer_cache import cached_bundle, fingerprint_file
from tercet.gguf import GGUFFile
from tercet.gguf_config import generation_config_from_gguf

T = TypeVar("T")

_SPACE = "▁"  # SentencePiece's mark for a space
_PADDING_TOKEN = re.compile(r"\[PAD\d+\]")
_TEMPLATE_KEY = "tokenizer.chat_template"
# GGUF key (after "tokenizer.ggml.") -> name of the special token.
_SPECIAL_KEYS = {
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "seperator_token_id": "sep_token",  # spelled so in the specification
    "padding_token_id": "pad_token",
    "cls_token_id": "cls_token",
    "mask_token_id": "mask_token",
}


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, numbered as in the specification."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def load_gguf_bundle(path: Path) -> TokenizerBundle:
    """The tokenizer of a GGUF file, converted now or read from the cache.

    Raises:
        UnsupportedModelError: the file has no tokenizer, or one of a kind that is not supported.
        GGUFError: the file is not GGUF, or corrupt.
    """
    return cached_bundle("gguf", fingerprint_file(path), lambda: convert_gguf(GGUFFile(path)))


def convert_gguf(file: GGUFFile) -> TokenizerBundle:
    """Convert an open file's tokenizer, past the cache.

    Raises:
        UnsupportedModelError: names the key that is missing, malformed or unsupported.
    """
    metadata = file.metadata
    vocabulary = _Vocabulary.from_metadata(metadata)
    kind = _read(metadata, "model", str)
    if kind == "gpt2":
        pre_tokenizer = pre_tokenizer_for(_read(metadata, "pre", str, "default"))
        parts = _byte_level_parts(metadata, vocabulary, pre_tokenizer)
        add_bos = pre_tokenizer.add_bos
    elif kind == "llama":
        parts = _sentencepiece_parts(metadata, vocabulary)
        add_bos = True
    else:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {kind!r}; supported are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece). Give a folder with the model's tokenizer.json as `tokenizer` instead"
        )
    parts["post_processor"] = _post_processor(metadata, vocabulary, add_bos)
    return TokenizerBundle(
        tokenizer_json=msgspec.json.encode(_tokenizer_json(vocabulary, parts)),
        special_tokens=_special_tokens(metadata, vocabulary),
        chat_templates=_chat_templates(metadata),
        generation_config=msgspec.json.encode(generation_config_from_gguf(file)),
        model_name=file.path.stem,
    )


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens in order of their ids, with their types."""

    tokens: list[str]
    types: list[int]

    @classmethod
    def from_metadata(cls, metadata: dict[str, object]) -> _Vocabulary:
        tokens = _read(metadata, "tokens", list)
        types = metadata.get("tokenizer.ggml.token_type")
        if types is None:
            return cls(tokens, [TokenType.NORMAL] * len(tokens))
        if not isinstance(types, np.ndarray) or len(types) != len(tokens):
            raise UnsupportedModelError(
                f"tokenizer.ggml.token_type must have one number for each of {len(tokens)} tokens"
            )
        return cls(tokens, [int(number) for number in types.tolist()])

    def ids(self) -> dict[str, int]:
        """token -> id. Without the padding that rounds a vocabulary up: its ids then decode to nothing."""
        return {
            token: token_id
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind != TokenType.UNUSED or not _PADDING_TOKEN.fullmatch(token)
        }

    def added_tokens(self) -> list[JSONObject]:
        """Tokens that are found in the text as they stand, before any splitting."""
        return [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != TokenType.USER_DEFINED,
            }
            for token_id, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if _is_added(token, kind)
        ]


def _is_added(token: str, kind: int) -> bool:
    # Runs of spaces that a user defined cannot be found in text, which has no "▁" yet: those are merged.
    if kind == TokenType.USER_DEFINED:
        return bool(token.strip(_SPACE))
    return kind in (TokenType.CONTROL, TokenType.UNKNOWN)


def _tokenizer_json(vocabulary: _Vocabulary, parts: JSONObject) -> JSONObject:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        **parts,
    }


def _bpe_model(vocabulary: _Vocabulary, merges: Sequence[Sequence[str]], **options: object) -> JSONObject:
    defaults: JSONObject = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**defaults, **options, "vocab": vocabulary.ids(), "merges": merges}


def _byte_level_parts(
    metadata: dict[str, object], vocabulary: _Vocabulary, pre_tokenizer: PreTokenizer
) -> JSONObject:
    merges = [merge.split(" ", 1) for merge in _read(metadata, "merges", list)]
    if any(len(merge) != 2 for merge in merges):
        raise UnsupportedModelError(
            "tokenizer.ggml.merges: every merge must be two tokens with a space between"
        )
    return {
        "normalizer": {"type": "NFC"} if pre_tokenizer.nfc else None,
        "pre_tokenizer": pre_tokenizer.to_json(),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe_model(vocabulary, merges, ignore_merges=pre_tokenizer.ignore_merges),
    }


def _sentencepiece_parts(metadata: dict[str, object], vocabulary: _Vocabulary) -> JSONObject:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(vocabulary.tokens):
        raise UnsupportedModelError("tokenizer.ggml.scores: SentencePiece needs one score for each token")
    unknown = _read(metadata, "unknown_token_id", int, 0)
    normalizers: list[JSONObject] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders: list[JSONObject] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if _read(metadata, "add_space_prefix", bool, True):
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe_model(
            vocabulary,
            sentencepiece_merges(vocabulary.tokens, vocabulary.types, scores.tolist()),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=_token_at(vocabulary, "unknown_token_id", unknown),
        ),
    }


def sentencepiece_merges(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merge list that makes BPE choose as SentencePiece does, best first.

    SentencePiece joins the two neighbours whose union has the highest score; a merge list ranks pairs. So
    each pair of tokens whose union is a token is ranked by that union's score.
    """
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED)
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind in mergeable}
    ranked = sorted(
        (-score, token_id)
        for token_id, (score, kind) in enumerate(zip(scores, types, strict=True))
        if kind in mergeable
    )
    merges: list[tuple[str, str]] = []
    for _, token_id in ranked:
        token = tokens[token_id]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in pieces and right in pieces:
                merges.append((left, right))
    return merges


def _post_processor(metadata: dict[str, object], vocabulary: _Vocabulary, add_bos: bool) -> JSONObject | None:
    """What is put around a text: BOS before and EOS after it, where the file or its kind asks for them."""
    wanted = {
        "bos_token_id": _read(metadata, "add_bos_token", bool, add_bos),
        "eos_token_id": _read(metadata, "add_eos_token", bool, False),
    }
    ids = {key: metadata.get(f"tokenizer.ggml.{key}") for key, want in wanted.items() if want}
    tokens = {
        key: (_token_at(vocabulary, key, token_id), token_id)
        for key, token_id in ids.items()
        if isinstance(token_id, int)
    }
    if not tokens:
        return None
    around = {key: [{"SpecialToken": {"id": token, "type_id": 0}}] for key, (token, _) in tokens.items()}
    before, after = around.get("bos_token_id", []), around.get("eos_token_id", [])
    text, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, *after, *before, second, *after],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]} for token, token_id in tokens.values()
        },
    }


def _special_tokens(metadata: dict[str, object], vocabulary: _Vocabulary) -> dict[str, str]:
    special = {}
    for key, name in _SPECIAL_KEYS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(token_id, int):
            special[name] = _token_at(vocabulary, key, token_id)
    return special


def _token_at(vocabulary: _Vocabulary, key: str, token_id: int) -> str:
    if not 0 <= token_id < len(vocabulary.tokens):
        raise UnsupportedModelError(
            f"tokenizer.ggml.{key} is {token_id}, outside the vocabulary of {len(vocabulary.tokens)}"
        )
    return vocabulary.tokens[token_id]


def _chat_templates(metadata: dict[str, object]) -> dict[str, str]:
    templates = {}
    for key, value in metadata.items():
        if isinstance(value, str) and key == _TEMPLATE_KEY:
            templates[DEFAULT_TEMPLATE] = value
        elif isinstance(value, str) and key.startswith(_TEMPLATE_KEY + "."):
            templates[key.removeprefix(_TEMPLATE_KEY + ".")] = value
    return templates


def _read(metadata: dict[str, object], key: str, kind: type[T], default: T | None = None) -> T:
    value: Any = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, kind):
        problem = "is missing" if value is None else f"must be of type {kind.__name__}; got {value!r:.60}"
        raise UnsupportedModelError(f"tokenizer.ggml.{key} {problem}; the file holds no usable tokenizer")
    return value
