"""POST /v1/responses and what belongs to it: a chat, asked for and answered in the form of OpenAI's responses.

Responses are kept where the server does so (`response_store.py`); without that, a response that asks to be
stored is refused, and none can be gone on with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, Final, cast

import msgspec

from tercet.frontend.outputs import CompletionOutput, RequestOutput
from tercet.frontend.server.call import Call, Events
from tercet.frontend.server.chat import ChatJob, check_chat, open_chat, usage_of
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import ApiError, bad_request, of_exception, unsupported
from tercet.frontend.server.generation import Generation
from tercet.frontend.server.logprobs import chat_logprobs
from tercet.frontend.server.parameters import REFUSED, RefusalTable, check_refused, decode
from tercet.frontend.server.protocol import ChatRequest
from tercet.frontend.server.response_shapes import OutputMessage, OutputText, ResponseBody
from tercet.frontend.server.response_store import StoredResponse
from tercet.frontend.server.responses import Usage
from tercet.frontend.server.sse import StreamEnd, encode, named_event

_LOGPROBS: Final = "message.output_text.logprobs"


class ResponsesRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/responses. Beside OpenAI's fields it takes vLLM's for sampling."""

    input: str | list[dict[str, Any]] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Beyond OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    # Known by name only: see `REFUSED_RESPONSES`.
    access_programs: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prompt: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning: Any = None
    service_tier: Any = None
    stream_options: Any = None
    text: Any = None
    tool_choice: Any = None
    tools: Any = None
    truncation: Any = None


REFUSED_RESPONSES: Final[RefusalTable] = {
    **{
        name: REFUSED[name]
        for name in ("moderation", "prompt_cache_options", "prompt_cache_retention", "service_tier", "tools")
    },
    "access_programs": ((), "there are no access programs; leave it out"),
    "background_options": ((), "is not supported; leave it out"),
    "context_management": ((), "contexts are not managed; leave it out"),
    "conversation": ((), "conversations are not kept; use previous_response_id"),
    "image": ((), "only text is supported"),
    "max_tool_calls": ((), "there are no tools; leave it out"),
    "parallel_tool_calls": ((True,), "there are no tools; leave it out"),
    "prompt": ((), "prompt templates are not kept; use input"),
    "reasoning": (({}, {"effort": "none"}), REFUSED["reasoning_effort"][1]),
    "stream_options": (({}, {"include_obfuscation": False}), "chunks are not padded; leave it out"),
    "text": (({}, {"format": {"type": "text"}}), REFUSED["response_format"][1]),
    "tool_choice": (("none", "auto"), REFUSED["tool_choice"][1]),
    "truncation": (("disabled",), "prompts are not cut; send what the model shall see"),
}

_DECODER: Final = msgspec.json.Decoder(ResponsesRequest)
# Handed to the chat under the same name.
_DIRECT: Final = (
    "model",
    "temperature",
    "top_p",
    "top_logprobs",
    "stream",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "ignore_eos",
    "priority",
    "cache_salt",
)


class _ResponseEnd(StreamEnd):
    """Errors within a stream of responses."""

    def __init__(self, numbers: _Numbers) -> None:
        self._numbers = numbers

    def error(self, error: ApiError) -> bytes:
        body = error.body
        data = {"type": "error", "code": body.code, "message": body.message, "param": body.param}
        return named_event("error", {**data, "sequence_number": self._numbers.next()})


class _Numbers:
    """Counts the events of a stream."""

    def __init__(self) -> None:
        self._count = -1

    def next(self) -> int:
        self._count += 1
        return self._count


async def create_response(call: Call) -> bytes | Events:
    """
    Raises:
        ApiError, TercetError: see `errors.of_exception`.
    """
    request: ResponsesRequest = decode(_DECODER, call.body)
    context = call.context
    check_refused(request, REFUSED_RESPONSES)
    stores = _stores(context, request)
    messages = conversation(context, request)
    name = f"resp_{call.name(request.request_id)}"
    job = check_chat(context, _chat_request(request, messages), name)
    answer = _Answer(request, job, messages)
    if request.background:
        return _in_background(call, answer)
    generation = await open_chat(call, job)
    if request.stream:
        numbers = _Numbers()
        call.stream_end = _ResponseEnd(numbers)
        return _events(context, generation, answer, stores, numbers)
    with generation:
        (output,) = await generation.results()
    response = answer.finished(output)
    if stores:
        _keep(context, answer, response)
    return encode(response)


def _stores(context: ServerContext, request: ResponsesRequest) -> bool:
    """Whether this response is to be kept."""
    if context.responses is None:
        for name in ("store", "background", "previous_response_id"):
            if getattr(request, name):
                raise unsupported(name, "this server keeps no responses (--enable-responses-store)")
        return False
    if request.background and request.store is False:
        raise bad_request("background", "background: needs store=true, to be retrieved")
    if request.background and request.stream:
        raise unsupported("background", "a background response is retrieved, not streamed")
    return request.store is not False


def conversation(context: ServerContext, request: ResponsesRequest) -> list[dict[str, Any]]:
    """The messages: of the response before, then of the input.

    Raises:
        ApiError: 400, the input holds what is no message; 404, there is no such response.
    """
    before: list[dict[str, Any]] = []
    if request.previous_response_id is not None:
        stored = stored_response(context, request.previous_response_id)
        if stored.response["status"] not in ("completed", "incomplete"):
            problem = f"is {stored.response['status']}; only a finished response can be gone on with"
            raise bad_request("previous_response_id", f"previous_response_id: {problem}")
        before = stored.messages
    if request.input is None:
        raise bad_request("input", "input: is missing", "missing_required_parameter")
    if isinstance(request.input, str):
        return [*before, {"role": "user", "content": request.input}]
    return [*before, *(_message(item, index) for index, item in enumerate(request.input))]


def _message(item: dict[str, Any], index: int) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind != "message":
        raise unsupported(f"input[{index}].type", f"only messages are supported; got {str(kind)[:60]!r}")
    role = "system" if item.get("role") == "developer" else item.get("role")
    return {"role": role, "content": item.get("content")}


def _chat_request(request: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    if request.instructions is not None:  # of this response alone: not of those that go on from it
        messages = [{"role": "system", "content": request.instructions}, *messages]
    include = request.include or []
    for one in include:
        if one != _LOGPROBS:
            raise unsupported("include", f"{one[:60]!r} is nothing that this server has; leave it out")
    fields = {name: getattr(request, name) for name in _DIRECT}
    logprobs = True if include or request.top_logprobs is not None else None
    return ChatRequest(
        messages=messages, max_completion_tokens=request.max_output_tokens, logprobs=logprobs, **fields
    )


class _Answer:
    """The response, as it grows."""

    def __init__(self, request: ResponsesRequest, job: ChatJob, messages: list[dict[str, Any]]) -> None:
        self.request = request
        self.job = job
        self.messages = messages
        self.item_id = f"msg_{job.name.removeprefix('resp_')}"

    def state(self, status: str, **fields: Any) -> ResponseBody:
        """The response with a status; what there is not yet is null."""
        request, params = self.request, self.job.params
        body: ResponseBody = {
            "id": self.job.name,
            "object": "response",
            "created_at": self.job.created_s,
            "status": status,
            "model": self.job.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "instructions": request.instructions,
            "previous_response_id": request.previous_response_id,
            "max_output_tokens": request.max_output_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_logprobs": request.top_logprobs or 0,
            "metadata": request.metadata or {},
            "background": bool(request.background),
            "user": request.user,
            "parallel_tool_calls": True,
            "tool_choice": "none",
            "tools": [],
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            "service_tier": "default",
        }
        return cast(ResponseBody, {**body, **fields})

    def item(self, status: str, content: list[OutputText]) -> OutputMessage:
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def part(self, text: str, logprobs: list[Any]) -> OutputText:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def logprobs(self, completion: CompletionOutput) -> list[Any]:
        if completion.logprobs is None:
            return []
        found = chat_logprobs(
            completion.logprobs, self.job.num_top, as_ids=False, bytes_of=self.job.context.bytes_of
        )
        return list(msgspec.to_builtins(found.content))

    def finished(self, output: RequestOutput) -> ResponseBody:
        """The response to a whole output."""
        (completion,) = output.outputs
        usage = usage_of([output], len(completion.token_ids))
        return self.ended(completion.text, self.logprobs(completion), completion.finish_reason, usage)

    def ended(self, text: str, logprobs: list[Any], reason: str | None, usage: Usage) -> ResponseBody:
        status = {"stop": "completed", "length": "incomplete"}.get(reason or "", "cancelled")
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        item = self.item("completed" if status == "completed" else "incomplete", [self.part(text, logprobs)])
        return self.state(
            status,
            output=[item],
            incomplete_details=details,
            usage={
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        )


def _keep(context: ServerContext, answer: _Answer, response: ResponseBody) -> None:
    if context.responses is not None:
        text = "".join(part["text"] for item in response["output"] for part in item["content"])
        messages = [*answer.messages, {"role": "assistant", "content": text}]
        context.responses.put(StoredResponse(response, messages))


# ---- a stream


async def _events(
    context: ServerContext, generation: Generation, answer: _Answer, stores: bool, numbers: _Numbers
) -> AsyncGenerator[bytes, None]:
    def event(kind: str, **fields: Any) -> bytes:
        return named_event(kind, {"type": kind, **fields, "sequence_number": numbers.next()})

    place = {"item_id": answer.item_id, "output_index": 0, "content_index": 0}
    texts: list[str] = []
    logprobs: list[Any] = []
    num_tokens, last, reason = 0, None, None
    with generation:
        async for step in generation.steps():
            parts: list[bytes] = []
            if last is None:
                parts += _opening(event, answer, place)
            for _, last in step:
                (completion,) = last.outputs
                num_tokens += len(completion.token_ids)
                reason = completion.finish_reason
                if completion.text or completion.logprobs:
                    found = answer.logprobs(completion)
                    texts.append(completion.text)
                    logprobs += found
                    fields = {**place, "delta": completion.text, "logprobs": found}
                    parts.append(event("response.output_text.delta", **fields))
            if parts:
                yield b"".join(parts)
    assert last is not None
    response = answer.ended("".join(texts), logprobs, reason, usage_of([last], num_tokens))
    if stores:
        _keep(context, answer, response)
    yield b"".join(_closing(event, answer, place, response))


def _opening(event: Any, answer: _Answer, place: dict[str, Any]) -> list[bytes]:
    state = answer.state("in_progress")
    return [
        event("response.created", response=state),
        event("response.in_progress", response=state),
        event("response.output_item.added", output_index=0, item=answer.item("in_progress", [])),
        event("response.content_part.added", **place, part=answer.part("", [])),
    ]


def _closing(event: Any, answer: _Answer, place: dict[str, Any], response: ResponseBody) -> list[bytes]:
    (item,) = response["output"]
    (part,) = item["content"]
    return [
        event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]),
        event("response.content_part.done", **place, part=part),
        event("response.output_item.done", output_index=0, item=item),
        event(
            "response.completed" if response["status"] == "completed" else "response.incomplete",
            response=response,
        ),
    ]


# ---- in the background


def _in_background(call: Call, answer: _Answer) -> bytes:
    """Answer at once; the response is computed whether or not its client stays."""
    context = call.context
    assert context.responses is not None
    stored = StoredResponse(answer.state("queued"), answer.messages)
    call.detached = True
    stored.task = asyncio.create_task(_compute(call, answer, stored))
    context.responses.put(stored)
    return encode(stored.response)


async def _compute(call: Call, answer: _Answer, stored: StoredResponse) -> None:
    context = call.context
    try:
        stored.response = answer.state("in_progress")
        async with asyncio.timeout(call.timeout_s or context.settings.request_timeout_s or None):
            with await open_chat(call, answer.job) as generation:
                (output,) = await generation.results()
        stored.response = answer.finished(output)
        text = output.outputs[0].text
        stored.messages = [*answer.messages, {"role": "assistant", "content": text}]
    except asyncio.CancelledError:
        stored.response = answer.state("cancelled")
        raise
    except Exception as error:
        failure = of_exception(error, chat=True).body
        code = "server_error" if failure.code is None else failure.code
        if isinstance(error, TimeoutError):
            code, failure.message = "deadline_exceeded", "the request took longer than it was given"
        stored.response = answer.state("failed", error={"code": code, "message": failure.message})
    finally:
        call.ticket.release()


# ---- stored responses


def stored_response(context: ServerContext, response_id: str) -> StoredResponse:
    """
    Raises:
        ApiError: 404.
    """
    stored = context.responses.get(response_id) if context.responses is not None else None
    if stored is None:
        message = f"there is no response {response_id[:200]!r} here"
        raise ApiError(404, message, param="response_id", code="response_not_found")
    return stored


async def cancel_response(context: ServerContext, response_id: str) -> ResponseBody:
    """Stop a response that is computed in the background; one that has ended stays as it is.

    Raises:
        ApiError: 404; 400, it is none of the background.
    """
    stored = stored_response(context, response_id)
    if stored.task is None:
        raise bad_request(
            "response_id", "response_id: only responses made with background=true can be cancelled"
        )
    if stored.task.cancel():
        await asyncio.wait([stored.task])
        if stored.response["status"] in ("queued", "in_progress"):  # before its first step
            stored.response = {**stored.response, "status": "cancelled"}
    return stored.response
