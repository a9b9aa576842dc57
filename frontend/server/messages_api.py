"""POST /v1/messages: a chat, asked for and answered in the form of Anthropic's API."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec

from tercet.frontend.outputs import CompletionOutput, RequestOutput
from tercet.frontend.server.call import Call, Events
from tercet.frontend.server.chat import ChatJob, check_chat, open_chat, render
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import ApiError, bad_request
from tercet.frontend.server.generation import Generation, in_render_pool
from tercet.frontend.server.parameters import RefusalTable, check_refused, decode
from tercet.frontend.server.protocol import ChatRequest, TokenizeRequest
from tercet.frontend.server.response_shapes import (
    MessageBody,
    MessagesError,
    MessageText,
    MessageUsage,
    TokenCount,
)
from tercet.frontend.server.sse import StreamEnd, encode, named_event

_NO_TOOLS: Final = "tools are not supported yet; leave it out"
_NOT_HERE: Final = "is not supported; leave it out"
REFUSED_MESSAGES: Final[RefusalTable] = {
    "container": ((), _NOT_HERE),
    "diagnostics": ((), _NOT_HERE),
    "inference_geo": ((), "requests are served where the server runs; leave it out"),
    "mcp_servers": (([],), _NO_TOOLS),
    "output_config": (({},), "constrained output is not supported yet; leave it out"),
    "service_tier": (("auto", "standard_only"), "there is one tier; leave it out"),
    "speed": (("standard",), "there is one speed; leave it out"),
    "thinking": (({"type": "disabled"},), "reasoning is not told apart from the answer yet; leave it out"),
    "tool_choice": (({"type": "none"},), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "user_profile_id": ((), _NOT_HERE),
    "workspace_id": ((), _NOT_HERE),
}


class MessagesMetadata(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Attributes: user_id: who asks, for the log."""

    user_id: str | None = None


class CountRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/messages/count_tokens, and what /v1/messages has in common with it."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    cache_control: dict[str, Any] | None = None  # every prefix is cached as it is
    # Known by name only.
    output_config: Any = None
    thinking: Any = None
    tool_choice: Any = None
    tools: Any = None
    mcp_servers: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None
    speed: Any = None


class MessagesRequest(CountRequest, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/messages"""

    max_tokens: int
    metadata: MessagesMetadata | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    service_tier: Any = None


_DECODER: Final = msgspec.json.Decoder(MessagesRequest)
_COUNT_DECODER: Final = msgspec.json.Decoder(CountRequest)

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_json(error: ApiError) -> bytes:
    """An error as Anthropic's clients know it."""
    kind = _KINDS.get(error.status, "api_error")
    body: MessagesError = {"type": "error", "error": {"type": kind, "message": error.body.message}}
    return encode(body)


class _MessagesEnd(StreamEnd):
    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % error_json(error)


async def create_message(call: Call) -> bytes | Events:
    """
    Raises:
        ApiError, TercetError: see `errors.of_exception`.
    """
    request: MessagesRequest = decode(_DECODER, call.body)
    check_refused(request, REFUSED_MESSAGES)
    job = check_chat(call.context, _chat_request(request), f"msg_{call.request_id}")
    call.stream_end = _MessagesEnd()
    generation = await open_chat(call, job)
    if request.stream:
        return _events(generation, job)
    with generation:
        (output,) = await generation.results()
    (completion,) = output.outputs
    content: list[MessageText] = [{"type": "text", "text": completion.text}]
    reason, sequence = _stop_reason(completion)
    usage = _usage(output, len(completion.token_ids))
    return encode(_message(job, content, reason, sequence, usage))


async def count_tokens(call: Call) -> bytes:
    """How many tokens the messages have, as the model would see them."""
    request: CountRequest = decode(_COUNT_DECODER, call.body)
    context = call.context
    check_refused(request, REFUSED_MESSAGES)
    context.check_model(request.model)
    count = await in_render_pool(context, _count, context, TokenizeRequest(**_chat_fields(request)))
    body: TokenCount = {"input_tokens": count}
    return encode(body)


def _count(context: ServerContext, request: TokenizeRequest) -> int:
    return len(context.tokenizer.encode(render(context, request), add_special_tokens=False))


def _chat_request(request: MessagesRequest) -> ChatRequest:
    return ChatRequest(
        **_chat_fields(request),
        model=request.model,
        max_tokens=request.max_tokens,
        stop=request.stop_sequences or None,
        stream=request.stream,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        user=request.metadata.user_id if request.metadata is not None else None,
    )


def _chat_fields(request: CountRequest) -> dict[str, Any]:
    """The messages. An assistant's at their end is the beginning of the answer."""
    messages = list(request.messages)
    for index, message in enumerate(messages):
        if message.get("role") not in ("user", "assistant", "system"):
            raise bad_request("messages", f"messages[{index}].role: must be 'user' or 'assistant'")
    continued = bool(messages) and messages[-1].get("role") == "assistant"
    if request.system:
        messages.insert(0, {"role": "system", "content": request.system})
    return {"messages": messages, "continue_final_message": continued}


def _stop_reason(completion: CompletionOutput) -> tuple[str | None, str | None]:
    """`stop_reason` and `stop_sequence`."""
    if completion.finish_reason == "length":
        return "max_tokens", None
    if isinstance(completion.stop_reason, str):
        return "stop_sequence", completion.stop_reason
    return ("end_turn" if completion.finish_reason == "stop" else completion.finish_reason), None


def _usage(output: RequestOutput, num_tokens: int) -> MessageUsage:
    cached = output.num_cached_tokens or 0
    return {
        "input_tokens": len(output.prompt_token_ids) - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": num_tokens,
    }


def _message(
    job: ChatJob, content: list[MessageText], reason: str | None, sequence: str | None, usage: MessageUsage
) -> MessageBody:
    return {
        "id": job.name,
        "type": "message",
        "role": "assistant",
        "model": job.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage,
    }


async def _events(generation: Generation, job: ChatJob) -> AsyncGenerator[bytes, None]:
    def event(kind: str, **fields: Any) -> bytes:
        return named_event(kind, {"type": kind, **fields})

    num_tokens, opened = 0, False
    with generation:
        async for step in generation.steps():
            parts: list[bytes] = []
            for _, output in step:
                (completion,) = output.outputs
                if not opened:
                    opened = True
                    start = _message(job, [], None, None, _usage(output, 0))
                    parts.append(event("message_start", message=start))
                    block = {"type": "text", "text": ""}
                    parts.append(event("content_block_start", index=0, content_block=block))
                num_tokens += len(completion.token_ids)
                if completion.text:
                    delta = {"type": "text_delta", "text": completion.text}
                    parts.append(event("content_block_delta", index=0, delta=delta))
                if output.finished:
                    reason, sequence = _stop_reason(completion)
                    end = {"stop_reason": reason, "stop_sequence": sequence}
                    parts.append(event("content_block_stop", index=0))
                    parts.append(event("message_delta", delta=end, usage=_usage(output, num_tokens)))
                    parts.append(event("message_stop"))
            if parts:
                yield b"".join(parts)
