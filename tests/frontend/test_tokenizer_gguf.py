"""Tokenizers out of GGUF files: the default model's, against what was published of it, and small ones."""

import time
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tercet.errors import UnsupportedModelError
from tercet.frontend.byte_tables import BYTE_TO_CHAR
from tercet.frontend.pre_tokenizers import pre_tokenizer_for
from tercet.frontend.tokenizer import Tokenizer, load_bundle
from tercet.frontend.tokenizer_gguf import convert_gguf, sentencepiece_merges
from tercet.gguf import GGUFFile
from tests.frontend.tokenizer_zoo import smollm2_gguf, specimen

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer(load_bundle(smollm2_gguf()))


# The default model


def test_published_ids(smollm2: Tokenizer) -> None:
    # As printed in a course's notebook that ran the model's own tokenizer.
    assert smollm2.encode("The Capital of France is") == [504, 14937, 282, 4649, 314]
    chat = smollm2.apply_chat_template(
        [{"role": "user", "content": "The Capital of France is"}], add_generation_prompt=True
    )
    assert chat[:8] == [1, 9690, 198, 2683, 359, 253, 5356, 5646]


def test_published_special_tokens(smollm2: Tokenizer) -> None:
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (smollm2.pad_token, smollm2.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert smollm2.all_special_ids == list(range(17))
    assert len(smollm2) == smollm2.vocab_size == 49152
    assert smollm2.generation_config["eos_token_id"] == 2


def test_published_pre_tokenizer(smollm2: Tokenizer) -> None:
    published = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    assert msgspec.json.decode(smollm2.bundle.tokenizer_json)["pre_tokenizer"] == published


def test_every_digit_is_a_token(smollm2: Tokenizer) -> None:
    tokens = smollm2.convert_ids_to_tokens(smollm2.encode("In 1984, 3.14159 and x12y"))
    assert [token for token in tokens if token and any(map(str.isdigit, token))] == list("198431415912")


def test_special_tokens_in_text_become_themselves(smollm2: Tokenizer) -> None:
    assert smollm2.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]
    assert smollm2.decode([1, 4093, 2], skip_special_tokens=True) == "user"


@given(st.text(max_size=40))
def test_text_survives(text: str) -> None:
    tokenizer = specimen("smollm2").backend
    # The model's vocabulary lacks 21 bytes: some control characters, and the start of planes 4 to 15.
    if all(tokenizer.token_to_id(BYTE_TO_CHAR[byte]) is not None for byte in text.encode()):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_second_start_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = smollm2_gguf()
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path))
    first = load_bundle(path)
    assert len(list((tmp_path / "tokenizers").iterdir())) == 1
    monkeypatch.setattr("tercet.frontend.tokenizer_gguf.convert_gguf", pytest.fail)
    start_s = time.perf_counter()
    assert load_bundle(path) == first
    assert time.perf_counter() - start_s < 0.5  # promised: 0.1 s


# Files written here


def write_gguf(path: Path, kind: str, **fields: Any) -> GGUFFile:
    """A GGUF file with nothing but a tokenizer: fields are named as after `tokenizer.ggml.`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", kind)
    for name, value in fields.items():
        key = name if "." in name else f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile(path)


def byte_level_fields(**changes: Any) -> dict[str, Any]:
    """GGUF fields of the byte-level tokenizer trained in these tests, padded to a round size."""
    state = msgspec.json.decode(specimen("byte_level").backend.to_str())
    vocabulary = dict(state["model"]["vocab"])
    types = dict.fromkeys(vocabulary.values(), NORMAL)
    for token in state["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    for token_id in range(len(vocabulary), 640):
        vocabulary[f"[PAD{token_id}]"] = token_id
        types[token_id] = UNUSED
    fields = {
        "pre": "gpt-2",
        "tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "token_type": [types[token_id] for token_id in range(len(vocabulary))],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "bos_token_id": vocabulary["<|start|>"],
        "eos_token_id": vocabulary["<|end|>"],
        "tokenizer.chat_template": "default one",
        "tokenizer.chat_template.tool_use": "with tools",
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def test_conversion_gives_back_the_tokenizer_that_was_written(tmp_path: Path) -> None:
    tokenizer = Tokenizer(convert_gguf(write_gguf(tmp_path / "m.gguf", "gpt2", **byte_level_fields())))
    original = specimen("byte_level").backend
    for text in ("Hello, it's 1984!  你好 🙂", "<|start|>a<tool>é naïve tok▁▁x<|end|>", "\n\t x"):
        ids = original.encode(text).ids
        assert tokenizer.encode(text) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == original.decode(ids, skip_special_tokens=skip)
    assert tokenizer.decode([639]) == ""  # padding of the vocabulary
    assert tokenizer.bundle.chat_templates == {"default": "default one", "tool_use": "with tools"}
    assert tokenizer.name_or_path == "m"


@pytest.mark.parametrize(
    ("tag", "text", "pieces"),
    [
        ("gpt-2", "it's 1234 x!!", ["it", "'s", "Ġ1234", "Ġx", "!!"]),
        ("smollm", "it's 1234 x!!", ["it", "'s", "Ġ", "1", "2", "3", "4", "Ġx", "!!"]),
        ("llama-bpe", "It'S 1234 x!!\n\n", ["It", "'S", "Ġ", "123", "4", "Ġx", "!!ĊĊ"]),
        ("qwen2", "It'S 1234 x!!\n\n", ["It", "'S", "Ġ", "1", "2", "3", "4", "Ġx", "!!ĊĊ"]),
        ("tekken", "camelCase 12", ["camel", "Case", "Ġ", "1", "2"]),
        ("gpt-4o", "don't camelCase 1234", ["don't", "Ġcamel", "Case", "Ġ", "123", "4"]),
        ("deepseek-v3", "x12345你好a!b", ["x", "123", "45", "ä½łå¥½", "a", "!b"]),
        ("falcon", "a,b 12345", ["a", ",", "b", "Ġ", "123", "45"]),
        ("default", "a$=b 12345", ["a", "$=", "b", "Ġ", "123", "45"]),
    ],
)
def test_text_is_split_as_the_tag_says(tag: str, text: str, pieces: list[str]) -> None:
    state = msgspec.json.decode(specimen("byte_level").backend.to_str())
    state["pre_tokenizer"] = pre_tokenizer_for(tag).to_json()
    splitter = tokenizers.Tokenizer.from_str(msgspec.json.encode(state).decode()).pre_tokenizer
    assert splitter is not None
    assert [piece for piece, _ in splitter.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(("stated", "added"), [(True, True), (False, False), (None, True)])
def test_llama3_adds_bos_unless_told_not_to(stated: bool | None, added: bool, tmp_path: Path) -> None:
    fields = byte_level_fields(pre="llama-bpe", add_bos_token=stated)
    tokenizer = Tokenizer(convert_gguf(write_gguf(tmp_path / "m.gguf", "gpt2", **fields)))
    assert (tokenizer.encode("x")[0] == tokenizer.bos_token_id) is added


def test_eos_is_added_where_the_file_asks(tmp_path: Path) -> None:
    fields = byte_level_fields(add_bos_token=True, add_eos_token=True)
    tokenizer = Tokenizer(convert_gguf(write_gguf(tmp_path / "m.gguf", "gpt2", **fields)))
    plain = tokenizer.encode("hi", add_special_tokens=False)
    assert tokenizer.encode("hi") == [tokenizer.bos_token_id, *plain, tokenizer.eos_token_id]


def sentencepiece_fields(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary by hand: bytes, characters, and unions with falling scores."""
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [
        "▁",
        *"helowrd",
        "▁h",
        "el",
        "lo",
        "▁hel",
        "▁hello",
        "▁w",
        "or",
        "ld",
        "▁world",
        "orld",
        "<tool>",
    ]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(words) - 1), USER_DEFINED]
    fields = {
        "tokens": [*special, *byte_tokens, *words],
        "token_type": types,
        "scores": [0.0] * 259 + [-float(rank) for rank in range(len(words))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def test_sentencepiece_vocabulary_becomes_bpe_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = Tokenizer(convert_gguf(write_gguf(tmp_path / "m.gguf", "llama", **sentencepiece_fields())))
    ids = tokenizer.encode("hello world é<tool>")
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<s>", "▁hello", "▁world", "▁", "<0xC3>", "<0xA9>", "<tool>",
    ]  # fmt: skip
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world é<tool>"


def test_sentencepiece_without_space_prefix(tmp_path: Path) -> None:
    fields = sentencepiece_fields(add_space_prefix=False, add_bos_token=False)
    tokenizer = Tokenizer(convert_gguf(write_gguf(tmp_path / "m.gguf", "llama", **fields)))
    ids = tokenizer.encode("hello world")
    assert tokenizer.convert_ids_to_tokens(ids) == ["h", "el", "lo", "▁world"]
    assert tokenizer.decode(ids) == "hello world"


def test_merges_are_ranked_by_the_score_of_the_union() -> None:
    tokens, scores = ["a", "b", "ab", "aba", "ba"], [0.0, 0.0, -3.0, -1.0, -2.0]
    merges = sentencepiece_merges(tokens, [NORMAL] * 5, scores)
    assert merges == [("a", "ba"), ("ab", "a"), ("b", "a"), ("a", "b")]


# Errors


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            "gpt2",
            byte_level_fields(pre="llama-99"),
            r"tokenizer\.ggml\.pre is 'llama-99'.*known are .*smollm",
        ),
        ("rwkv", byte_level_fields(), r"tokenizer\.ggml\.model is 'rwkv'"),
        ("gpt2", byte_level_fields(merges=None), r"tokenizer\.ggml\.merges is missing"),
        ("gpt2", byte_level_fields(merges=["nospace"]), r"tokenizer\.ggml\.merges: every merge"),
        ("gpt2", byte_level_fields(tokens=None), r"tokenizer\.ggml\.tokens is missing"),
        ("gpt2", byte_level_fields(token_type=[1, 2]), r"tokenizer\.ggml\.token_type must have one number"),
        ("gpt2", byte_level_fields(bos_token_id=99_999), r"tokenizer\.ggml\.bos_token_id is 99999, outside"),
        ("llama", sentencepiece_fields(scores=None), r"tokenizer\.ggml\.scores"),
    ],
)
def test_unusable_tokenizers_are_named(
    kind: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        convert_gguf(write_gguf(tmp_path / "m.gguf", kind, **fields))
