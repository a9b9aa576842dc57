"""The files that make up a tokenizer, as one value that can cross a wire or lie in a cache.

Owns their names and where in them the special tokens and chat templates are found. Does not build a tokenizer
(`tokenizer`) nor convert one (`tokenizer_gguf`, `tokenizer_convert`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tercet.errors import UnsupportedModelError

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
DEFAULT_TEMPLATE = "default"

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_TEMPLATE = "chat_template.jinja"
_LEGACY_TEMPLATE = "chat_template.json"  # written beside processors: {"chat_template": "…"}
_TEMPLATE_FOLDER = "additional_chat_templates/"
_GENERATION = "generation_config.json"


class TokenizerBundle(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a frontend needs to tokenize, render chats and stop.

    Attributes:
        tokenizer_json: the `tokenizers` library's file.
        tokenizer_config: JSON object with the settings beside it (add_bos_token, added_tokens_decoder, …).
        special_tokens: name (bos_token, eos_token, …) -> token, for those that the model has.
        additional_special_tokens: further special tokens, which have no name.
        chat_templates: name -> Jinja source; the usual one is called "default".
        generation_config: JSON object with the model's default sampling settings and EOS ids.
        model_name: for messages to people.
    """

    tokenizer_json: bytes
    tokenizer_config: bytes = b"{}"
    special_tokens: dict[str, str] = {}
    additional_special_tokens: list[str] = []
    chat_templates: dict[str, str] = {}
    generation_config: bytes = b"{}"
    model_name: str = ""

    @property
    def chat_template(self) -> str | None:
        """The default chat template."""
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], model_name: str = "") -> TokenizerBundle:
        """Build from file contents by Hugging Face's file names; unknown names are left aside.

        Raises:
            UnsupportedModelError: tokenizer.json is missing, or a file is not what its name says.
        """
        if _TOKENIZER not in files:
            raise UnsupportedModelError(f"{model_name or 'tokenizer'}: there is no {_TOKENIZER}")
        config = _json_object(files, _CONFIG)
        special_map = _json_object(files, _SPECIAL_TOKENS)
        templates = _templates(files, config)
        merged = {**special_map, **{key: value for key, value in config.items() if value is not None}}
        named = {name: _content(merged[name]) for name in SPECIAL_TOKEN_NAMES if merged.get(name)}
        additional = merged.get("additional_special_tokens") or merged.get("extra_special_tokens") or []
        config.pop("chat_template", None)
        return cls(
            tokenizer_json=bytes(files[_TOKENIZER]),
            tokenizer_config=msgspec.json.encode(config),
            special_tokens=named,
            additional_special_tokens=[_content(token) for token in additional]
            if isinstance(additional, list)
            else [],
            chat_templates=templates,
            generation_config=msgspec.json.encode(_json_object(files, _GENERATION)),
            model_name=model_name,
        )

    def to_files(self) -> dict[str, bytes]:
        """The bundle as files, by name; `from_files` of them gives an equal bundle."""
        special: dict[str, object] = dict(self.special_tokens)
        if self.additional_special_tokens:
            special["additional_special_tokens"] = self.additional_special_tokens
        files = {
            _TOKENIZER: self.tokenizer_json,
            _CONFIG: self.tokenizer_config,
            _SPECIAL_TOKENS: msgspec.json.encode(special),
            _GENERATION: self.generation_config,
        }
        for name, template in self.chat_templates.items():
            path = _TEMPLATE if name == DEFAULT_TEMPLATE else f"{_TEMPLATE_FOLDER}{name}.jinja"
            files[path] = template.encode("utf-8")
        return files


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a model folder, by name. The large ones of a model are not among them."""
    names = [_TOKENIZER, _CONFIG, _SPECIAL_TOKENS, _TEMPLATE, _LEGACY_TEMPLATE, _GENERATION]
    names += [
        f"{_TEMPLATE_FOLDER}{path.name}" for path in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))
    ]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(files.get(name, b"{}"), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(f"{name}: not a JSON object ({error}); fetch the model again") from None


def _content(token: object) -> str:
    """A special token is written as a string or as the settings of an added token."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise UnsupportedModelError(f"{_CONFIG}: {token!r} is not a special token; expected a string")
    return content


def _templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. A file of their own goes before the entry in tokenizer_config.json."""
    templates: dict[str, str] = {}
    for source in (_json_object(files, _LEGACY_TEMPLATE), config):
        entry = source.get("chat_template")
        if isinstance(entry, str):
            templates[DEFAULT_TEMPLATE] = entry
        elif isinstance(entry, list):  # older form of several templates: [{"name": …, "template": …}, …]
            templates |= {str(item["name"]): str(item["template"]) for item in entry}
    for name, content in files.items():
        if name == _TEMPLATE:
            templates[DEFAULT_TEMPLATE] = content.decode("utf-8")
        elif name.startswith(_TEMPLATE_FOLDER) and name.endswith(".jinja"):
            templates[name.removeprefix(_TEMPLATE_FOLDER).removesuffix(".jinja")] = content.decode("utf-8")
    return templates
