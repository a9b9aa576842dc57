"""Pre-tokenizers of byte-level BPE vocabularies, by the tag that GGUF files carry (`tokenizer.ggml.pre`).

A GGUF file names the way its model splits text before BPE but does not hold it; the way itself is kept here,
in the form of tokenizer.json. Splitting otherwise gives valid but wrong tokens (digits above all), so a tag
that is not listed is an error, not a default.

Source: the tokenizer.json files that the models were published with, and the tags' meaning in llama.cpp
(`llama-vocab.cpp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tercet.errors import UnsupportedModelError

# Parts of a tokenizer.json are JSON objects.
JSONObject = dict[str, Any]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

# Llama 3 and its kin differ in how many digits stay together.
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_DEFAULT_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"


def _split(pattern: str) -> JSONObject:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _to_bytes(split_like_gpt2: bool) -> JSONObject:
    """The step that writes text in the byte alphabet; it has GPT-2's own splitting built in."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split_like_gpt2,
    }


_EACH_DIGIT: JSONObject = {"type": "Digits", "individual_digits": True}
_THREE_DIGITS = _split("[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is split before byte-level BPE.

    Attributes:
        stages: of tokenizer.json's pre_tokenizer; each splits what the ones before have left.
        ignore_merges: a piece that is in the vocabulary as a whole is not built from merges.
        add_bos: whether a BOS token is put first if the file does not say.
        nfc: whether text is brought to Unicode normal form C.
    """

    stages: tuple[JSONObject, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False

    def to_json(self) -> JSONObject:
        """The `pre_tokenizer` of a tokenizer.json."""
        return {"type": "Sequence", "pretokenizers": list(self.stages)}


def _by_regex(*patterns: str) -> tuple[JSONObject, ...]:
    return (*map(_split, patterns), _to_bytes(split_like_gpt2=False))


_GPT2 = (_to_bytes(split_like_gpt2=True),)
_DIGITS_APART = (_EACH_DIGIT, *_GPT2)
_PLAIN_GPT2 = PreTokenizer(_GPT2)
_LIKE_SMOLLM = PreTokenizer(_DIGITS_APART)
_LIKE_LLAMA3 = PreTokenizer(_by_regex(_LLAMA3), ignore_merges=True, add_bos=True)
_LIKE_QWEN2 = PreTokenizer(_by_regex(_QWEN2), nfc=True)
_FALCON = (
    {"type": "Punctuation", "behavior": "Contiguous"},
    *_GPT2,
    {"type": "Digits", "individual_digits": False},
    _THREE_DIGITS,
)

_BY_TAG: dict[str, PreTokenizer] = {
    "default": PreTokenizer((_split(_DEFAULT_PUNCTUATION), *_GPT2, _split(r"\p{N}+"), _THREE_DIGITS)),
    "gpt-2": _PLAIN_GPT2,
    "gpt2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "roberta-bpe": _PLAIN_GPT2,
    "smollm": _LIKE_SMOLLM,
    "starcoder": _LIKE_SMOLLM,
    "refact": _LIKE_SMOLLM,
    "codeshell": _LIKE_SMOLLM,
    "minerva-7b": _LIKE_SMOLLM,
    "command-r": PreTokenizer(_DIGITS_APART, nfc=True),
    "falcon": PreTokenizer(_FALCON),
    "llama-bpe": _LIKE_LLAMA3,
    "llama3": _LIKE_LLAMA3,
    "llama-v3": _LIKE_LLAMA3,
    "falcon3": _LIKE_LLAMA3,
    "dbrx": PreTokenizer(_by_regex(_LLAMA3)),
    "smaug-bpe": PreTokenizer(_by_regex(_LLAMA3)),
    "chatglm-bpe": PreTokenizer(_by_regex(_LLAMA3)),
    "qwen2": _LIKE_QWEN2,
    "deepseek-r1-qwen": _LIKE_QWEN2,
    "megrez": _LIKE_QWEN2,
    "stablelm2": PreTokenizer(_by_regex(_QWEN2)),
    "tekken": PreTokenizer(_by_regex(_TEKKEN), ignore_merges=True, add_bos=True),
    "gpt-4o": PreTokenizer(_by_regex(_GPT4O), ignore_merges=True),
    "llama4": PreTokenizer(_by_regex(_GPT4O), ignore_merges=True, add_bos=True),
    "deepseek-v3": PreTokenizer(_by_regex(*_DEEPSEEK3)),
}


def pre_tokenizer_for(tag: str) -> PreTokenizer:
    """The pre-tokenizer that a GGUF tag names.

    Raises:
        UnsupportedModelError: the tag is unknown; the message names it and the known ones.
    """
    if tag not in _BY_TAG:
        known = ", ".join(sorted(_BY_TAG))
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre is {tag!r}, a pre-tokenizer that is not supported; known are {known}. "
            "Give a folder with the model's tokenizer.json as `tokenizer` instead"
        )
    return _BY_TAG[tag]
