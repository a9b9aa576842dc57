"""Bodies of responses that are put together as dictionaries: those of /v1/responses and /v1/messages.

Each is written whole: what there is not yet is null. The OpenAPI document is made from these types.

Source: OpenAI's API reference (responses), Anthropic's (messages).
"""

from __future__ import annotations

from typing import Any, TypedDict


class OutputText(TypedDict):
    """The text of a message, with the log-probabilities of its tokens where they were asked for."""

    type: str
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(TypedDict):
    id: str
    type: str
    role: str
    status: str
    content: list[OutputText]


class ResponseFailure(TypedDict):
    """Why a response failed that was computed in the background."""

    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: str


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseBody(TypedDict):
    """A response of /v1/responses, finished or not."""

    id: str
    object: str
    created_at: int
    status: str
    model: str
    output: list[OutputMessage]
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    temperature: float
    top_p: float
    top_logprobs: int
    metadata: dict[str, str]
    background: bool
    user: str | None
    parallel_tool_calls: bool
    tool_choice: str
    tools: list[Any]
    text: dict[str, Any]
    truncation: str
    service_tier: str


class DeletedResponse(TypedDict):
    id: str
    object: str
    deleted: bool


class MessageText(TypedDict):
    type: str
    text: str


class MessageUsage(TypedDict):
    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageBody(TypedDict):
    """A response of /v1/messages."""

    id: str
    type: str
    role: str
    model: str
    content: list[MessageText]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """A response of /v1/messages/count_tokens."""

    input_tokens: int


class MessagesErrorDetail(TypedDict):
    type: str
    message: str


class MessagesError(TypedDict):
    """An error in the form of Anthropic's API."""

    type: str
    error: MessagesErrorDetail
