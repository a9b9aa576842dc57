"""Tokenizers from files: the same ids, text and special tokens as transformers gives."""

import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from tercet.errors import ModelNotFoundError, UnsupportedModelError, ValidationError
from tercet.frontend.tokenizer import Tokenizer, load_bundle
from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tercet.frontend.tokenizer_cache import cached_bundle
from tests.frontend.tokenizer_zoo import ADDED, CORPUS, minilm_dir, specimen

CHATML = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|start|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True, "normalized": False},
    "pad_token": None,
    "additional_special_tokens": ["<extra>"],
    "model_max_length": 1000,
    "chat_template": CHATML,
}


def write_model(folder: Path, name: str = "byte_level", **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(specimen(name).backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
    return folder


def hugging_face(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def test_importing_the_tokenizer_loads_neither_torch_nor_transformers() -> None:
    check = (
        "import sys, tercet.frontend.tokenizer; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "unigram", "word_piece"])
def test_ids_and_special_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, name)
    ours, theirs = Tokenizer(load_bundle(folder)), hugging_face(folder)
    for text in (*CORPUS[:5], "<|start|>hi<|end|><extra>", " x <tool>y", ""):
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(
                text, add_special_tokens=special
            )
    assert len(ours) == len(theirs)
    assert ours.vocab_size == theirs.vocab_size
    for field in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert set(theirs.all_special_ids) <= set(ours.all_special_ids)
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("in_config", [True, False, None])
def test_bos_is_added_if_tokenizer_json_says_so(
    in_file: bool, in_config: bool | None, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, add_bos_token=in_config)
    if in_file:
        backend = tokenizers.Tokenizer.from_str(specimen("byte_level").backend.to_str())
        bos = ("<|start|>", specimen("byte_level").id_of("<|start|>"))
        backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[bos])
        (folder / "tokenizer.json").write_text(backend.to_str())
    tokenizer = Tokenizer(load_bundle(folder))
    assert (tokenizer.encode("hi")[0] == tokenizer.bos_token_id) is in_file
    assert tokenizer.encode("hi") == hugging_face(folder).encode("hi")


def test_minilm_is_neither_cut_nor_filled() -> None:
    tokenizer = Tokenizer(load_bundle(minilm_dir()))
    assert tokenizer.encode("Hello world") == [101, 7592, 2088, 102]  # published ids of bert-base-uncased
    assert len(tokenizer.encode("word " * 600)) == 602  # its file asks to cut and fill to 128
    assert tokenizer.decode([101, 7592, 2088, 102], skip_special_tokens=True) == "hello world"


def test_bundle_survives_files_and_the_wire(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    bundle = load_bundle(folder)
    assert bundle.chat_templates == {"default": CHATML, "tool_use": "tools"}
    assert TokenizerBundle.from_files(bundle.to_files(), bundle.model_name) == bundle
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(bundle), type=TokenizerBundle) == bundle
    assert Tokenizer(bundle).generation_config == {"eos_token_id": [1, 2], "temperature": 0.5}


def test_template_file_goes_before_the_config_and_names_are_read(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "docs"}]
    folder = write_model(tmp_path, chat_template=named)
    assert load_bundle(folder).chat_templates == {"default": "old", "rag": "docs"}
    (folder / "chat_template.jinja").write_text("new")
    assert load_bundle(folder).chat_template == "new"


def test_special_tokens_map_fills_in_what_the_config_lacks(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<tool>", "unk_token": {"content": "é"}})
    )
    tokenizer = Tokenizer(load_bundle(folder))
    assert (tokenizer.bos_token, tokenizer.unk_token) == ("<|start|>", "é")
    assert tokenizer.convert_tokens_to_ids(["<|start|>", "no such"]) == [
        tokenizer.bos_token_id,
        tokenizer.unk_token_id,
    ]


def test_tokens_that_only_the_config_declares_are_added(tmp_path: Path) -> None:
    size = specimen("byte_level").vocab_size
    entry = {"content": "<new>", "special": True, "normalized": False}
    folder = write_model(tmp_path, added_tokens_decoder={str(size): entry}, additional_special_tokens=[])
    tokenizer = Tokenizer(load_bundle(folder))
    assert tokenizer.encode("a<new>")[-1] == size == tokenizer.max_token_id
    assert tokenizer.decode([size], skip_special_tokens=True) == ""


def test_folder_without_tokenizer_json_is_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(cache))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", "!"]
    (model / "vocab.txt").write_text("\n".join(words))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = Tokenizer(load_bundle(model))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello worlds!")) == [
        "[CLS]", "hello", "world", "##s", "!", "[SEP]",
    ]  # fmt: skip
    monkeypatch.setattr("tercet.frontend.tokenizer._convert", pytest.fail)  # the cache must answer
    assert Tokenizer(load_bundle(model)).encode("hello") == tokenizer.encode("hello")


def test_broken_cache_entry_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path))
    bundle = TokenizerBundle(tokenizer_json=b"{}")
    assert cached_bundle("test", "key", lambda: bundle) == bundle
    (entry,) = (tmp_path / "tokenizers").iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-3])
    assert cached_bundle("test", "key", lambda: bundle) == bundle
    assert entry.read_bytes() == whole


def test_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path / "file"))
    bundle = TokenizerBundle(tokenizer_json=b"{}")
    assert cached_bundle("test", "key", lambda: bundle) == bundle


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(max_examples=40)
@given(text=st.text(max_size=30))
def test_text_survives_encoding(name: str, text: str) -> None:
    backend = specimen(name).backend
    tokenizer = Tokenizer(TokenizerBundle(tokenizer_json=backend.to_str().encode()))
    # In SentencePiece's alphabet "▁" is a space, and after an added token the text begins anew with a space.
    if not {"▁", *ADDED} & {*text}:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batch_gives_what_single_texts_give() -> None:
    tokenizer = Tokenizer(TokenizerBundle(tokenizer_json=specimen("byte_level").backend.to_str().encode()))
    assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]


def test_chat_is_encoded_without_further_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(load_bundle(write_model(tmp_path)))
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|start|>user\nhi<|end|>\n"
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode(str(text), add_special_tokens=False)


def test_template_is_chosen_by_name_by_tools_or_given() -> None:
    templates = {"default": "plain", "tool_use": "tools", "rag": "documents"}
    bundle = TokenizerBundle(
        tokenizer_json=specimen("byte_level").backend.to_str().encode(), chat_templates=templates
    )
    tokenizer = Tokenizer(bundle)
    assert tokenizer.get_chat_template() == "plain"
    assert tokenizer.get_chat_template(tools=[{}]) == "tools"
    assert tokenizer.get_chat_template("rag") == "documents"
    assert tokenizer.get_chat_template("{{ own }}") == "{{ own }}"


# Errors


@pytest.mark.parametrize("text", ["\ud800", 5, None, ["a"]])
def test_text_that_is_not_unicode_is_refused(text: Any) -> None:
    tokenizer = Tokenizer(TokenizerBundle(tokenizer_json=specimen("byte_level").backend.to_str().encode()))
    with pytest.raises(ValidationError, match="prompt: text"):
        tokenizer.encode(text)
    with pytest.raises(ValidationError, match="prompt: text"):
        tokenizer.encode_batch(["fine", text])


def test_model_without_a_template_says_so() -> None:
    tokenizer = Tokenizer(TokenizerBundle(tokenizer_json=specimen("byte_level").backend.to_str().encode()))
    with pytest.raises(ValidationError, match="chat_template: the model has no default chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_bundle(tmp_path / "nothing")
    with pytest.raises(ModelNotFoundError, match=r"holds no tokenizer\.json"):
        load_bundle(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(load_bundle(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json: not a JSON object"):
        load_bundle(tmp_path)


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = Tokenizer(TokenizerBundle(tokenizer_json=specimen("byte_level").backend.to_str().encode()))
    texts = [random.Random(seed).choice(CORPUS)[seed % 7 :] for seed in range(200)]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == alone


def test_call_gives_ids_and_mask_as_transformers_does(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    ours, theirs = Tokenizer(load_bundle(folder)), hugging_face(folder)
    for text in (CORPUS[0], list(CORPUS[:3])):
        found, expected = ours(text), theirs(text)
        assert found.input_ids == found["input_ids"] == expected["input_ids"]
        assert found.attention_mask == expected["attention_mask"]
