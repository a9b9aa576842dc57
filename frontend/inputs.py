"""Prompts in the forms that users give them, brought to one form.

Knows shapes and types. Tokenizing, and what a particular model accepts, is the input processor's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, cast

import numpy as np

from tercet.errors import ValidationError
from tercet.frontend.validation import MAX_ID_CHARS, check_str, check_unicode, shown


class TextPrompt(TypedDict):
    """A prompt of text, with options.

    Keys:
        prompt: the text.
        cache_salt: requests share cached prefixes only with requests of the same salt.
    """

    prompt: str
    cache_salt: NotRequired[str]


class TokensPrompt(TypedDict):
    """A prompt of token ids, with options.

    Keys:
        prompt_token_ids: the tokens.
        prompt: their text, for the output's `prompt` field; the model does not see it.
        cache_salt: requests share cached prefixes only with requests of the same salt.
    """

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    cache_salt: NotRequired[str]


PromptType: TypeAlias = str | list[int] | TextPrompt | TokensPrompt

_UNSUPPORTED = (
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "prompt_embeds",
    "token_type_ids",
    "encoder_prompt",
    "decoder_prompt",
)
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class ParsedPrompt(NamedTuple):
    """A prompt with its form checked. At least one of `text` and `token_ids` is there; token_ids win."""

    text: str | None
    token_ids: Sequence[int] | np.ndarray | None
    cache_salt: str


def parse_prompt(prompt: PromptType) -> ParsedPrompt:
    """Check a prompt's form. Token ids are looked at later, all at once.

    Raises:
        ValidationError: the prompt has none of the forms, or asks for what is not supported.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(_checked_text(prompt), None, "")
    if isinstance(prompt, (list, tuple, np.ndarray)):
        return ParsedPrompt(None, prompt, "")
    if isinstance(prompt, dict):
        return _parse_dict(cast("dict[str, Any]", prompt))
    raise ValidationError("prompt", f"must be a string, a list of token ids or a dict; got {shown(prompt)}")


def as_prompts(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """One prompt or several, as a list. An empty list is no prompt rather than an empty one.

    Raises:
        ValidationError: it is neither.
    """
    if isinstance(prompts, (str, dict)):
        return [cast(PromptType, prompts)]
    if isinstance(prompts, np.ndarray) and prompts.ndim == 1:
        return [cast(PromptType, prompts)]
    if not isinstance(prompts, (list, tuple, np.ndarray)):
        raise ValidationError("prompts", f"must be a prompt or a list of prompts; got {shown(prompts)}")
    if len(prompts) and isinstance(prompts[0], (int, float, np.integer)):
        return [cast(PromptType, prompts)]
    return cast("list[PromptType]", list(prompts))


def _parse_dict(prompt: dict[str, Any]) -> ParsedPrompt:
    for key in prompt:
        if key in _UNSUPPORTED:
            if prompt[key] is not None:
                raise ValidationError(str(key), "is not supported yet; leave it out")
        elif key not in _KEYS:
            raise ValidationError("prompt", f"has an unknown key {shown(key)}; known are {', '.join(_KEYS)}")
    text, token_ids, salt = (prompt.get(key) for key in _KEYS)
    if text is None and token_ids is None:
        raise ValidationError("prompt", "a dict needs the key 'prompt' or 'prompt_token_ids'")
    if text is not None:
        _checked_text(text)
    if token_ids is not None and not isinstance(token_ids, (list, tuple, np.ndarray)):
        raise ValidationError("prompt_token_ids", f"must be a list of integers; got {shown(token_ids)}")
    if salt is not None:
        check_str("cache_salt", salt, MAX_ID_CHARS)
    return ParsedPrompt(text, token_ids, salt or "")


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValidationError("prompt", f"must be a string; got {shown(text)}")
    check_unicode("prompt", text)
    return text
