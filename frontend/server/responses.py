"""Bodies of responses: plain structs that msgspec turns into JSON.

`None` is written as null, `UNSET` not at all. Streamed chunks are not made of these: see `sse.py`.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct, gc=False):
    """Attributes: cached_tokens: prompt tokens found in the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def make_usage(num_prompt: int, num_completion: int, num_cached: int) -> Usage:
    """Token counts of one response, over all of its prompts and choices."""
    return Usage(num_prompt, num_completion, num_prompt + num_completion, PromptTokensDetails(num_cached))


class TopLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, gc=False):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, gc=False):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct, gc=False):
    """Attributes: text_offset: of each token in the text, in characters."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class ChatMessage(msgspec.Struct, gc=False):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, gc=False):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, gc=False):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_logprobs: list[Any] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(msgspec.Struct, gc=False):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, gc=False):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    object: str = "text_completion"


class Model(msgspec.Struct, gc=False):
    id: str
    created: int
    root: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "tercet"
    parent: str | None = None


class ModelList(msgspec.Struct, gc=False):
    data: list[Model]
    object: str = "list"


class TokenizeResponse(msgspec.Struct, gc=False):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, gc=False):
    prompt: str
