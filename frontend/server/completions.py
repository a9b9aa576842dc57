"""POST /v1/completions."""

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
from tercet.frontend.server.errors import bad_request
from tercet.frontend.server.generation import Generation
from tercet.frontend.server.logprobs import CompletionLogprobsBuilder, prompt_logprobs_json
from tercet.frontend.server.parameters import (
    check_num_prompts,
    check_refused,
    check_stream_options,
    decode,
    sampling_of_completion,
)
from tercet.frontend.server.protocol import CompletionPrompt, CompletionRequest, StreamOptions
from tercet.frontend.server.request_log import log_request
from tercet.frontend.server.responses import Completion, CompletionChoice, CompletionLogprobs, make_usage
from tercet.frontend.server.sse import DONE, ChunkEncoder, encode

_DECODER: Final = msgspec.json.Decoder(CompletionRequest)


@dataclass(slots=True)
class CompletionJob:
    """A completion request that has been checked.

    Attributes:
        name: id of the response.
        model: as the response calls it.
        prompts: each a text or a list of token ids.
        n: choices of each prompt in the response, which may be fewer than `params.n` (best_of).
    """

    request: CompletionRequest
    params: SamplingParams
    options: StreamOptions
    name: str
    model: str
    prompts: list[str | list[int]]
    n: int
    created_s: int
    context: ServerContext

    @property
    def hides_output(self) -> bool:
        """Whether the prompt alone is asked for."""
        return self.request.max_tokens == 0

    def echoed(self, output: RequestOutput) -> str:
        """The prompt's text, where it comes before the output."""
        if not self.request.echo:
            return ""
        if output.prompt is not None:
            return output.prompt
        return self.context.tokenizer.decode(output.prompt_token_ids, skip_special_tokens=True)

    def logprobs_builder(self) -> CompletionLogprobsBuilder:
        tokenizer = self.context.tokenizer if self.context.engine.has_tokenizer else None
        return CompletionLogprobsBuilder(
            self.request.logprobs or 0,
            as_ids=bool(self.request.return_tokens_as_token_ids),
            decode=None if tokenizer is None else tokenizer.decode,
        )


async def completions(call: Call) -> bytes | Events:
    """Complete one prompt or several.

    Raises:
        ApiError, TercetError: see `errors.of_exception`.
    """
    request: CompletionRequest = decode(_DECODER, call.body)
    job = check_completion(call.context, request, f"cmpl-{call.name(request.request_id)}")
    generation = await open_completion(call, job)
    if request.stream:
        return _events(generation, job)
    with generation:
        outputs = await generation.results()
    return encode(completion(job, outputs))


def check_completion(context: ServerContext, request: CompletionRequest, name: str) -> CompletionJob:
    """Everything that can be said of a request before its prompts are tokenized."""
    model = context.check_model(request.model)
    check_refused(request)
    options = check_stream_options(request, context.settings.enable_force_include_usage)
    prompts = split_prompts(request.prompt)
    params = sampling_of_completion(request, context.engine.model_info.default_sampling)
    n = 1 if request.n is None else request.n
    return CompletionJob(request, params, options, name, model, prompts, n, int(time.time()), context)


async def open_completion(call: Call, job: CompletionJob) -> Generation:
    """Tokenize and send the prompts."""
    request = job.request
    num_tokens = sum(len(p) if isinstance(p, list) else len(p) // BYTES_PER_TOKEN for p in job.prompts)
    call.ticket.count(job.params.n * len(job.prompts), num_tokens)
    salt = {} if request.cache_salt is None else {"cache_salt": request.cache_salt}
    prompts: list[Any] = [
        {("prompt" if isinstance(prompt, str) else "prompt_token_ids"): prompt, **salt}
        for prompt in job.prompts
    ]
    log_request(call, job.name, job.model, request.user)
    return await Generation.open(
        call.context.engine,
        prompts,
        job.params,
        request_id=call.engine_id(),
        priority=request.priority or 0,
        add_special_tokens=request.add_special_tokens is not False,
        ticket=call.ticket,
        trace_headers=call.headers,
    )


def split_prompts(prompt: CompletionPrompt | None) -> list[str | list[int]]:
    """A prompt, a list of texts, of token ids, or of lists of token ids, as a list of prompts.

    Raises:
        ApiError: 400, it is none of these.
    """
    if prompt is None:
        raise bad_request("prompt", "prompt: is missing", "missing_required_parameter")
    if isinstance(prompt, str):
        return [prompt]
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]  # type: ignore[list-item]  # as just seen
    if len(kinds) > 1:
        raise bad_request("prompt", "prompt: mixes texts, token ids and lists; give a list of one kind")
    check_num_prompts(len(prompt))
    return prompt  # type: ignore[return-value]


# ---- one response


def completion(job: CompletionJob, outputs: Sequence[RequestOutput]) -> Completion:
    """The response of finished requests, one for each prompt."""
    choices: list[CompletionChoice] = []
    for output in outputs:
        echoed = job.echoed(output)
        for chosen in _best(output.outputs, job.n):
            choices.append(_choice(job, len(choices), output, chosen, echoed))
    num_completion = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return Completion(
        id=job.name,
        created=job.created_s,
        model=job.model,
        choices=choices,
        usage=make_usage(
            sum(len(output.prompt_token_ids) for output in outputs),
            0 if job.hides_output else num_completion,
            sum(output.num_cached_tokens or 0 for output in outputs),
        ),
    )


def _best(found: Sequence[CompletionOutput], n: int) -> Sequence[CompletionOutput]:
    """The n with the highest log-probability per token, best first, where there are more (best_of)."""
    if len(found) <= n:
        return found

    def mean_logprob(one: CompletionOutput) -> float:
        return (one.cumulative_logprob or 0.0) / max(1, len(one.token_ids))

    return sorted(found, key=mean_logprob, reverse=True)[:n]


def _choice(
    job: CompletionJob, index: int, output: RequestOutput, one: CompletionOutput, echoed: str
) -> CompletionChoice:
    request = job.request
    hides = job.hides_output
    shows_prompt = request.prompt_logprobs is not None and output.prompt_logprobs is not None
    return CompletionChoice(
        index=index,
        text=echoed if hides else echoed + one.text,
        logprobs=_logprobs(job, job.logprobs_builder(), output, one, with_prompt=bool(request.echo)),
        finish_reason="length" if hides else one.finish_reason,
        stop_reason=None if hides else one.stop_reason,
        token_ids=([] if hides else one.token_ids) if request.return_token_ids else UNSET,
        prompt_logprobs=prompt_logprobs_json(output.prompt_logprobs or []) if shows_prompt else UNSET,
        prompt_token_ids=output.prompt_token_ids if request.return_token_ids else UNSET,
    )


def _logprobs(
    job: CompletionJob,
    builder: CompletionLogprobsBuilder,
    output: RequestOutput,
    one: CompletionOutput,
    *,
    with_prompt: bool,
) -> CompletionLogprobs | None:
    if job.request.logprobs is None or one.logprobs is None:
        return None
    token_ids: list[int] = [] if job.hides_output else one.token_ids
    entries: list[Any] = list(one.logprobs)[: len(token_ids)]
    if with_prompt and output.prompt_logprobs is not None:
        token_ids = output.prompt_token_ids + token_ids
        entries = list(output.prompt_logprobs) + entries
    return builder.build(token_ids, entries)


# ---- a stream


async def _events(generation: Generation, job: CompletionJob) -> AsyncGenerator[bytes, None]:
    writer = _CompletionWriter(job)
    with generation:
        async for step in generation.steps():
            parts: list[bytes] = []
            for prompt_index, output in step:
                writer.write(parts, prompt_index, output)
            if parts:
                yield parts[0] if len(parts) == 1 else b"".join(parts)
    yield writer.ending()


class _CompletionWriter:
    """The chunks of the outputs of one request's prompts."""

    def __init__(self, job: CompletionJob) -> None:
        self._job = job
        self._return_ids = bool(job.request.return_token_ids)
        self._continuous = bool(job.options.continuous_usage_stats)
        self._usage_field = bool(job.options.include_usage) or self._continuous
        self._encoder = ChunkEncoder(
            job.name, "text_completion", job.created_s, job.model, chat=False, usage_field=self._usage_field
        )
        self._is_plain = job.params.logprobs is None and not self._return_ids and not self._continuous
        self._is_plain &= not job.hides_output
        num_choices = len(job.prompts) * job.n
        self._num_tokens = [0] * num_choices
        wants_logprobs = job.request.logprobs is not None
        self._builders = [job.logprobs_builder() for _ in range(num_choices)] if wants_logprobs else []
        self._last: list[RequestOutput | None] = [None] * len(job.prompts)

    def write(self, parts: list[bytes], prompt_index: int, output: RequestOutput) -> None:
        """Add the chunks of everything new of one prompt."""
        last, self._last[prompt_index] = self._last[prompt_index], output
        if output.prompt_logprobs is None and last is not None:
            output.prompt_logprobs = last.prompt_logprobs  # for choices whose first token comes later
        for one in output.outputs:
            index = prompt_index * self._job.n + one.index
            first = not self._num_tokens[index]
            self._num_tokens[index] += len(one.token_ids)
            echoed = self._job.echoed(output) if first else ""
            if self._is_plain and one.finish_reason is None:
                if text := echoed + one.text:
                    parts.append(self._encoder.text(index, text))
            else:
                parts.append(self._chunk(index, output, one, echoed, first))

    def _chunk(
        self, index: int, output: RequestOutput, one: CompletionOutput, echoed: str, first: bool
    ) -> bytes:
        job, hides = self._job, self._job.hides_output
        logprobs = None
        if job.request.logprobs is not None:
            with_prompt = bool(job.request.echo) and first
            logprobs = _logprobs(job, self._builders[index], output, one, with_prompt=with_prompt)
        return self._encoder.chunk(
            index,
            echoed if hides else echoed + one.text,
            logprobs=logprobs,
            finish_reason="length" if hides and one.finish_reason else one.finish_reason,
            stop_reason=None if hides else one.stop_reason,
            token_ids=([] if hides else one.token_ids) if self._return_ids else None,
            prompt_token_ids=output.prompt_token_ids if self._return_ids and first else None,
            usage=self._usage() if self._continuous else None,
        )

    def _usage(self) -> Any:
        outputs = [output for output in self._last if output is not None]
        return make_usage(
            sum(len(output.prompt_token_ids) for output in outputs),
            0 if self._job.hides_output else sum(self._num_tokens),
            sum(output.num_cached_tokens or 0 for output in outputs),
        )

    def ending(self) -> bytes:
        """What comes after the last chunk."""
        if self._job.options.include_usage:
            return self._encoder.usage(self._usage()) + DONE
        return DONE
