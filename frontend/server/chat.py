"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from msgspec import UNSET

from tercet.frontend.outputs import CompletionOutput, RequestOutput
from tercet.frontend.sampling_params import SamplingParams
from tercet.frontend.server.admission import BYTES_PER_TOKEN
from tercet.frontend.server.call import Call, Events
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import unsupported
from tercet.frontend.server.generation import Generation, in_render_pool
from tercet.frontend.server.logprobs import chat_logprobs, prompt_logprobs_json
from tercet.frontend.server.parameters import check_refused, check_stream_options, decode, sampling_of_chat
from tercet.frontend.server.protocol import ChatRequest, StreamOptions, TokenizeRequest
from tercet.frontend.server.request_log import log_request
from tercet.frontend.server.responses import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Usage,
    make_usage,
)
from tercet.frontend.server.sse import DONE, ChunkEncoder, encode

_DECODER: Final = msgspec.json.Decoder(ChatRequest)


@dataclass(slots=True)
class ChatJob:
    """A chat that has been checked.

    Attributes:
        name: id of the response.
        model: as the response calls it.
        opening: text of the last message, which `echo` puts before the answer; empty otherwise.
    """

    request: ChatRequest
    params: SamplingParams
    options: StreamOptions
    name: str
    model: str
    opening: str
    created_s: int
    context: ServerContext

    @property
    def num_top(self) -> int:
        return self.request.top_logprobs or 0

    @property
    def as_ids(self) -> bool:
        return bool(self.request.return_tokens_as_token_ids)


async def chat_completions(call: Call) -> bytes | Events:
    """Answer a chat.

    Raises:
        ApiError, TercetError: see `errors.of_exception`.
    """
    request: ChatRequest = decode(_DECODER, call.body)
    job = check_chat(call.context, request, f"chatcmpl-{call.name(request.request_id)}")
    generation = await open_chat(call, job)
    if request.stream:
        return _events(generation, job)
    with generation:
        (output,) = await generation.results()
    return encode(chat_completion(job, output))


def check_chat(context: ServerContext, request: ChatRequest, name: str) -> ChatJob:
    """Everything that can be said of a chat before its template is rendered."""
    model = context.check_model(request.model)
    check_refused(request)
    options = check_stream_options(request, context.settings.enable_force_include_usage)
    check_template(context, request)
    params = sampling_of_chat(request, context.engine.model_info.default_sampling)
    opening = _opening(request.messages) if request.echo else ""
    return ChatJob(request, params, options, name, model, opening, int(time.time()), context)


async def open_chat(call: Call, job: ChatJob) -> Generation:
    """Render, tokenize and send a chat. Every endpoint that takes messages ends up here."""
    request, context = job.request, call.context
    call.ticket.count(job.params.n, len(call.body) // BYTES_PER_TOKEN)
    text = await in_render_pool(context, render, context, request)
    prompt: Any = {"prompt": text}
    if request.cache_salt is not None:
        prompt["cache_salt"] = request.cache_salt
    log_request(call, job.name, job.model, request.user or request.safety_identifier)
    return await Generation.open(
        context.engine,
        [prompt],
        job.params,
        request_id=call.engine_id(),
        priority=request.priority or 0,
        add_special_tokens=bool(request.add_special_tokens),
        ticket=call.ticket,
        trace_headers=call.headers,
    )


def check_template(context: ServerContext, request: ChatRequest | TokenizeRequest) -> None:
    """
    Raises:
        ApiError: 400, the request brings a template of its own, which this server does not take.
    """
    if request.chat_template is not None and not context.settings.trust_request_chat_template:
        raise unsupported(
            "chat_template",
            "templates come from whoever runs the server (--trust-request-chat-template allows others)",
        )


def render(context: ServerContext, request: ChatRequest | TokenizeRequest) -> str:
    """The chat as text. Takes its time: not for the event loop.

    Raises:
        ValidationError: the messages are wrong, or the template refuses them.
    """
    tokenizer = context.tokenizer
    continued = bool(request.continue_final_message)
    opened = not continued if request.add_generation_prompt is None else request.add_generation_prompt
    text = tokenizer.apply_chat_template(
        request.messages or [],
        tools=getattr(request, "tools", None) or None,
        documents=request.documents,
        chat_template=request.chat_template or context.settings.chat_template,
        add_generation_prompt=opened,
        continue_final_message=continued,
        tokenize=False,
        **_checked_kwargs(request.chat_template_kwargs),
    )
    assert isinstance(text, str)
    return text


# What apply_chat_template takes itself: as keywords they would not reach the renderer's own check.
_ARGUMENTS: Final = frozenset(
    {
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
    }
)


def _checked_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    for name in kwargs or {}:
        if name in _ARGUMENTS:
            raise unsupported(f"chat_template_kwargs.{name}", "is set by the server; leave it out")
    return kwargs or {}


def _opening(messages: Sequence[dict[str, Any]]) -> str:
    content = messages[-1].get("content") if messages and messages[-1].get("role") == "assistant" else None
    return content if isinstance(content, str) else ""


# ---- one response


def chat_completion(job: ChatJob, output: RequestOutput) -> ChatCompletion:
    """The response of a finished chat."""
    request = job.request
    choices = [_choice(job, completion) for completion in output.outputs]
    return ChatCompletion(
        id=job.name,
        created=job.created_s,
        model=job.model,
        choices=choices,
        usage=usage_of([output], sum(len(completion.token_ids) for completion in output.outputs)),
        prompt_logprobs=(
            UNSET if output.prompt_logprobs is None else prompt_logprobs_json(output.prompt_logprobs)
        ),
        prompt_token_ids=output.prompt_token_ids if request.return_token_ids else UNSET,
    )


def _choice(job: ChatJob, completion: CompletionOutput) -> ChatChoice:
    return ChatChoice(
        index=completion.index,
        message=ChatMessage(job.opening + completion.text),
        logprobs=_logprobs(job, completion),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        token_ids=completion.token_ids if job.request.return_token_ids else UNSET,
    )


def _logprobs(job: ChatJob, completion: CompletionOutput) -> ChatLogprobs | None:
    if completion.logprobs is None:
        return None
    return chat_logprobs(completion.logprobs, job.num_top, as_ids=job.as_ids, bytes_of=job.context.bytes_of)


def usage_of(outputs: Sequence[RequestOutput], num_completion: int) -> Usage:
    """Usage over some prompts."""
    return make_usage(
        sum(len(output.prompt_token_ids) for output in outputs),
        num_completion,
        sum(output.num_cached_tokens or 0 for output in outputs),
    )


# ---- a stream


async def _events(generation: Generation, job: ChatJob) -> AsyncGenerator[bytes, None]:
    writer = _ChatWriter(job)
    last: RequestOutput | None = None
    with generation:
        async for step in generation.steps():
            for _, last in step:
                if data := writer.write(last):
                    yield data
    ending = DONE
    if job.options.include_usage and last is not None:
        ending = writer.encoder.usage(usage_of([last], writer.num_tokens)) + DONE
    yield ending


class _ChatWriter:
    """The chunks of one chat's outputs."""

    def __init__(self, job: ChatJob) -> None:
        self._job = job
        self._return_ids = bool(job.request.return_token_ids)
        self._continuous = bool(job.options.continuous_usage_stats)
        usage_field = bool(job.options.include_usage) or self._continuous
        self.encoder = ChunkEncoder(
            job.name,
            "chat.completion.chunk",
            job.created_s,
            job.model,
            chat=True,
            usage_field=usage_field,
        )
        self._is_plain = job.params.logprobs is None and not self._return_ids and not self._continuous
        self._num_tokens = [0] * job.params.n

    @property
    def num_tokens(self) -> int:
        return sum(self._num_tokens)

    def write(self, output: RequestOutput) -> bytes:
        """Chunks of everything new, to be written at once; empty where nothing can be shown yet."""
        parts: list[bytes] = []
        for completion in output.outputs:
            index = completion.index
            if not self._num_tokens[index]:
                self._open(parts, index, output)
            self._num_tokens[index] += len(completion.token_ids)
            if self._is_plain and completion.finish_reason is None:
                if completion.text:
                    parts.append(self.encoder.text(index, completion.text))
            else:
                parts.append(self._chunk(completion, output))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _open(self, parts: list[bytes], index: int, output: RequestOutput) -> None:
        ids = output.prompt_token_ids if self._return_ids and index == 0 else None
        parts.append(self.encoder.role(index, ids))
        if self._job.opening:
            parts.append(self.encoder.text(index, self._job.opening))

    def _chunk(self, completion: CompletionOutput, output: RequestOutput) -> bytes:
        usage = None
        if self._continuous:
            usage = usage_of([output], self.num_tokens)
        return self.encoder.chunk(
            completion.index,
            completion.text,
            logprobs=_logprobs(self._job, completion),
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            token_ids=completion.token_ids if self._return_ids else None,
            usage=usage,
        )
