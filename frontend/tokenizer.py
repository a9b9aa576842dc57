"""Text to token ids and back, on the `tokenizers` library alone: neither transformers nor torch is imported.

`load_bundle` finds a tokenizer's files, `Tokenizer` is built from them (here or after they crossed a wire).
Streaming text is the detokenizer's affair, rendering chats `chat_template`'s.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import msgspec
import tokenizers
from tokenizers import AddedToken

from tercet.errors import ModelNotFoundError, UnsupportedModelError, ValidationError
from tercet.frontend.chat_messages import Message
from tercet.frontend.chat_template import render_chat
from tercet.frontend.tokenizer_bundle import DEFAULT_TEMPLATE, TokenizerBundle, read_tokenizer_files
from tercet.frontend.tokenizer_cache import cached_bundle, fingerprint_files
from tercet.frontend.tokenizer_gguf import load_gguf_bundle

# Files that transformers can make a tokenizer.json of.
_CONVERTIBLE = (
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_CONVERSION_TIMEOUT_S = 600


def load_bundle(source: Path) -> TokenizerBundle:
    """Read the tokenizer of a model: a folder in Hugging Face form, or a GGUF file.

    A GGUF file's tokenizer, and that of a folder without tokenizer.json, is converted once and then cached.

    Raises:
        ModelNotFoundError: there is nothing at `source`, or no tokenizer in that folder.
        UnsupportedModelError: the tokenizer is broken or of a kind that is not supported.
    """
    if source.is_file():
        return load_gguf_bundle(source)
    if not source.is_dir():
        raise ModelNotFoundError(f"tokenizer: {source} does not exist; give a model folder or a .gguf file")
    files = read_tokenizer_files(source)
    if "tokenizer.json" in files:
        return TokenizerBundle.from_files(files, source.name)
    old = [source / name for name in _CONVERTIBLE if (source / name).is_file()]
    if not old:
        raise ModelNotFoundError(
            f"tokenizer: {source} holds no tokenizer.json; fetch the model's tokenizer files"
        )
    settings = [source / name for name in ("config.json", *files) if (source / name).is_file()]

    def convert() -> TokenizerBundle:
        return TokenizerBundle.from_files({**files, "tokenizer.json": _convert(source)}, source.name)

    return cached_bundle("folder", fingerprint_files([*old, *settings]), convert)


def _convert(folder: Path) -> bytes:
    program = Path(__file__).with_name("tokenizer_convert.py")
    # -P: the program's folder stays off its path, where our modules' names could hide other packages.
    command = [sys.executable, "-P", str(program), str(folder.resolve())]
    done = subprocess.run(command, capture_output=True, timeout=_CONVERSION_TIMEOUT_S, check=False)
    if done.returncode:
        reason = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise UnsupportedModelError(
            f"tokenizer: {folder} has no tokenizer.json and cannot be converted: {reason}"
        )
    return done.stdout


class Encoding(dict[str, Any]):
    """`input_ids` and `attention_mask`, as keys and as attributes."""

    @property
    def input_ids(self) -> Any:
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        return self["attention_mask"]


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads at once.

    Args:
        bundle: its files.

    Raises:
        UnsupportedModelError: tokenizer.json cannot be read.
    """

    def __init__(self, bundle: TokenizerBundle) -> None:
        self.bundle = bundle
        self._config: dict[str, Any] = msgspec.json.decode(bundle.tokenizer_config, type=dict[str, Any])
        self._backend = _build_backend(bundle, self._config)

    # Encoding and decoding

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens spelled out in the text become themselves.

        Args:
            add_special_tokens: add what the model expects around a text (BOS, [CLS], …). tokenizer.json says
                what that is; `add_bos_token` in tokenizer_config.json does not count, as in transformers 5.

        Raises:
            ValidationError: the text is not a string, or not valid Unicode.
        """
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise _bad_text(error) from None
        return ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text; several at a time on as many cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise _bad_text(error) from None
        return [encoding.ids for encoding in encodings]

    def __call__(self, text: str | Sequence[str], add_special_tokens: bool = True) -> Encoding:
        """Ids and mask of a text, or lists of them for several, as transformers' tokenizers give."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return Encoding(input_ids=ids, attention_mask=[1] * len(ids))
        batch = self.encode_batch(text, add_special_tokens)
        return Encoding(input_ids=batch, attention_mask=[[1] * len(ids) for ids in batch])

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of token ids, all at once. Ids that the vocabulary lacks have no text."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """The vocabulary's spelling of a token or of several; None for ids that it lacks."""
        if isinstance(ids, int):
            token: str | None = self._backend.id_to_token(ids)
            return token
        return [self._backend.id_to_token(token_id) for token_id in ids]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int | None] | None:
        """Ids of tokens in the vocabulary's spelling; the unknown token's id (or None) for others."""
        if isinstance(tokens, str):
            token_id: int | None = self._backend.token_to_id(tokens)
            return self.unk_token_id if token_id is None else token_id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    # The vocabulary

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's tokenizer, to be read only."""
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones; `len(tokenizer)` has them."""
        return int(self._backend.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> dict[str, int]:
        """token -> id, added tokens included."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    @cached_property
    def max_token_id(self) -> int:
        """The highest id that stands for a token."""
        return max(self.get_vocab().values(), default=-1)

    # Special tokens

    @property
    def special_tokens_map(self) -> dict[str, str | list[str]]:
        """Name -> special token, and `additional_special_tokens`, as chat templates see them."""
        tokens: dict[str, str | list[str]] = dict(self.bundle.special_tokens)
        if self.bundle.additional_special_tokens:
            tokens["additional_special_tokens"] = list(self.bundle.additional_special_tokens)
        return tokens

    @cached_property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens` leaves out, ascending."""
        added = self._backend.get_added_tokens_decoder()
        return sorted(token_id for token_id, token in added.items() if token.special)

    @property
    def all_special_tokens(self) -> list[str]:
        added = self._backend.get_added_tokens_decoder()
        return [added[token_id].content for token_id in self.all_special_ids]

    @property
    def bos_token(self) -> str | None:
        return self.bundle.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.bundle.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.bundle.special_tokens.get("pad_token")

    @property
    def unk_token(self) -> str | None:
        return self.bundle.special_tokens.get("unk_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's EOS token; `generation_config` may name more that end a generation."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._special_id("unk_token")

    def _special_id(self, name: str) -> int | None:
        token = self.bundle.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    # Settings and chats

    @property
    def name_or_path(self) -> str:
        return self.bundle.model_name

    @property
    def model_max_length(self) -> int | None:
        """Length that the tokenizer's config names, if it does; the engine's limit is another."""
        length = self._config.get("model_max_length")
        return int(length) if isinstance(length, (int, float)) and length < 1e9 else None

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The model's default sampling settings and EOS ids; empty if it has none."""
        return msgspec.json.decode(self.bundle.generation_config, type=dict[str, Any])

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template."""
        return self.bundle.chat_template

    def get_chat_template(self, chat_template: str | None = None, tools: object = None) -> str:
        """The template to use: the one given (source, or name of one of the model's), else the model's.

        A model's template called "tool_use" goes before the default one if there are tools.

        Raises:
            ValidationError: the model has no such template.
        """
        templates = self.bundle.chat_templates
        if chat_template is not None:
            return templates.get(chat_template, chat_template)
        name = "tool_use" if tools and "tool_use" in templates else DEFAULT_TEMPLATE
        if name not in templates:
            others = f"; the model has those named {sorted(templates)}" if templates else ""
            raise ValidationError(
                "chat_template",
                f"the model has no default chat template{others}: give one, or use completions",
            )
        return templates[name]

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **chat_template_kwargs: Any,
    ) -> str | list[int]:
        """Render a conversation and, with `tokenize`, encode it; the template alone adds special tokens.

        Arguments are those of `chat_template.render_chat`, which says what it raises.
        """
        text = render_chat(
            self.get_chat_template(chat_template, tools),
            conversation,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            special_tokens=self.special_tokens_map,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _bad_text(error: Exception) -> ValidationError:
    why = "holds a lone surrogate" if isinstance(error, UnicodeEncodeError) else "is not a string"
    return ValidationError("prompt", f"text {why}; give valid Unicode text")


def _build_backend(bundle: TokenizerBundle, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_buffer(bundle.tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        name = bundle.model_name or "tokenizer"
        raise UnsupportedModelError(f"{name}: tokenizer.json cannot be read ({error})") from None
    # How training batches were cut and filled; prompts are neither.
    backend.no_truncation()
    backend.no_padding()
    _add_tokens(backend, bundle, config)
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, bundle: TokenizerBundle, config: Mapping[str, Any]) -> None:
    """Add tokens that only tokenizer_config.json names, and mark the model's special tokens as such."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    declared: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for _, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            token = AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
            backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            known[token.content] = token
    for content in (*bundle.special_tokens.values(), *bundle.additional_special_tokens):
        if content not in known or not known[content].special:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
