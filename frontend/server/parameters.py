"""What each parameter of a request means: honoured, or refused by its name.

`REFUSED` is the table of parameters that are known but ask for what the engine does not do, each with the values
that ask for nothing. Everything else of `protocol.py` is turned into `SamplingParams` here, or read by the
handler of its route. docs/server.md lists them all, and a test compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import msgspec

from tercet.frontend.sampling_params import RequestOutputKind, SamplingParams
from tercet.frontend.server.errors import ApiError, bad_request, unsupported
from tercet.frontend.server.limits import MAX_MESSAGES, MAX_PROMPTS, MAX_REQUEST_ID_CHARS
from tercet.frontend.server.protocol import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from tercet.frontend.validation import shown

_NO_TOOLS: Final = "tool calls are not supported yet; leave it out"
_NO_GRAMMAR: Final = "constrained output is not supported yet; leave it out"
_NO_MEDIA: Final = "only text is supported"
_NO_REASONING: Final = "reasoning is not told apart from the answer yet; leave it out"
_NO_TRANSFER: Final = "transfers between engines are not supported yet; leave it out"
_NO_BEAMS: Final = "beam search is offered by LLM.beam_search only; leave it out"
_NO_STORE: Final = "chat completions are not stored; leave it out"

# Parameter -> (values that ask for nothing, beside null; why others are refused).
RefusalTable: TypeAlias = Mapping[str, tuple[tuple[Any, ...], str]]
REFUSED: Final[RefusalTable] = {
    "audio": ((), _NO_MEDIA),
    "ec_transfer_params": ((), _NO_TRANSFER),
    "function_call": (("none",), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "guided_choice": ((), _NO_GRAMMAR),
    "guided_grammar": ((), _NO_GRAMMAR),
    "guided_json": ((), _NO_GRAMMAR),
    "guided_regex": ((), _NO_GRAMMAR),
    "include_reasoning": ((True,), _NO_REASONING),
    "kv_transfer_params": ((), _NO_TRANSFER),
    "length_penalty": ((1, 1.0), _NO_BEAMS),
    "logprob_token_ids": ((), "is not supported yet; use logprobs"),
    "media_io_kwargs": (({},), _NO_MEDIA),
    "metadata": (({},), _NO_STORE),
    "mm_processor_kwargs": (({},), _NO_MEDIA),
    "modalities": ((["text"],), _NO_MEDIA),
    "moderation": ((), "answers are not moderated; leave it out"),
    "parallel_tool_calls": ((), _NO_TOOLS),
    "prediction": ((), "predicted outputs are not supported; leave it out"),
    "prompt_cache_options": (({},), "prefixes are cached without options; leave it out"),
    "prompt_cache_retention": (
        ("in_memory", "in-memory"),
        "cached prefixes stay in memory only, as long as there is room",
    ),
    "prompt_embeds": ((), "prompts are text or token ids"),
    "reasoning_effort": (("none",), _NO_REASONING),
    "repetition_detection": ((), "is not supported yet; use max_tokens or penalties"),
    "response_format": (({"type": "text"},), _NO_GRAMMAR),
    "service_tier": (("auto", "default"), "there is one tier; leave it out, or give 'default'"),
    "session_id": ((), "requests belong to no session; leave it out"),
    "store": ((False,), _NO_STORE),
    "structured_outputs": ((), _NO_GRAMMAR),
    "suffix": (("",), "insertion before a suffix is not supported; leave it out"),
    "thinking_token_budget": ((), _NO_REASONING),
    "tool_choice": (("none",), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "truncate_prompt_tokens": ((), "prompts are not cut; send what the model shall see"),
    "truncation_side": ((), "prompts are not cut; send what the model shall see"),
    "use_beam_search": ((False,), _NO_BEAMS),
    "verbosity": (("medium",), "the model takes no verbosity; say it in a message"),
    "vllm_xargs": (({},), "there are no custom arguments; leave it out"),
    "web_search_options": ((), "there is no web search; leave it out"),
}

# Handed to SamplingParams under the same name.
_DIRECT: Final = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "stream_interval",
    "prompt_logprobs",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)

_REQUEST_ID: Final = re.compile(rf"[\x21-\x7e]{{1,{MAX_REQUEST_ID_CHARS}}}")


def decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    """A request's body.

    Raises:
        ApiError: 400, it is not JSON, or a field is unknown or of the wrong type; names the field.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _schema_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(None, f"the body is not valid JSON: {error}", "invalid_json") from None
    except RecursionError:
        raise bad_request(None, "the body is nested too deeply", "invalid_json") from None


def _schema_error(problem: str) -> ApiError:
    """msgspec's words with the field's name in front of them."""
    words, _, path = problem.partition(" - at `$")
    if unknown := re.search(r"unknown field `(.*?)`", words):
        prefix = path.removesuffix("`").lstrip(".")
        name = f"{prefix}.{unknown[1]}" if prefix else unknown[1]
        return ApiError(
            400, f"{name[:200]}: is no parameter here", param=name[:200], code="unknown_parameter"
        )
    if missing := re.search(r"missing required field `(.*?)`", words):
        return bad_request(missing[1], f"{missing[1]}: is missing", "missing_required_parameter")
    field = path.removesuffix("`").lstrip(".") or None
    words = words[:1].lower() + words[1:].replace("`", "")
    return bad_request(field, f"{field}: {words}" if field else f"the body: {words}", "invalid_type")


def check_refused(request: msgspec.Struct, table: RefusalTable = REFUSED) -> None:
    """
    Args:
        table: of the request's kind, in the form of `REFUSED`.

    Raises:
        ApiError: 400, a parameter asks for what the engine does not do.
    """
    for name in request.__struct_fields__:
        if name in table and (value := getattr(request, name)) is not None:
            neutral, why = table[name]
            if not any(type(value) is type(one) and value == one for one in neutral):
                raise unsupported(name, f"{why} (got {shown(value)})")


def check_stream_options(request: GenerationRequest, force_usage: bool) -> StreamOptions:
    """The options of the stream, with every default resolved.

    Raises:
        ApiError: 400, there is no stream, or an option asks for what is not done.
    """
    options = request.stream_options
    if options is None:
        return StreamOptions(include_usage=force_usage, continuous_usage_stats=False)
    if not request.stream:
        raise bad_request("stream_options", "stream_options: goes with stream=true only")
    if options.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation", "chunks are not padded; leave it out")
    usage = bool(options.include_usage) or force_usage
    return StreamOptions(include_usage=usage, continuous_usage_stats=bool(options.continuous_usage_stats))


def check_request_id(name: str, value: str | None) -> str | None:
    """A client's id for its request.

    Raises:
        ApiError: 400, it has characters that a header cannot carry, or too many.
    """
    if value is not None and not _REQUEST_ID.fullmatch(value):
        problem = f"{name}: must be 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters without spaces"
        raise bad_request(name, problem)
    return value


def sampling_of_chat(request: ChatRequest, defaults: dict[str, float | int]) -> SamplingParams:
    """
    Args:
        request: its refused parameters have been looked at.
        defaults: the model's own.

    Raises:
        ApiError, ValidationError: a parameter is wrong.
    """
    if not request.messages:
        raise bad_request("messages", "messages: is empty; give at least one message")
    if len(request.messages) > MAX_MESSAGES:
        raise bad_request("messages", f"messages: has {len(request.messages)}, at most {MAX_MESSAGES} may be")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs", "top_logprobs: goes with logprobs=true only")
    if request.top_logprobs is not None and request.top_logprobs < 0:
        raise bad_request("top_logprobs", f"top_logprobs: must be 0 or more; got {request.top_logprobs}")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling(request, defaults, max_tokens=_chat_max_tokens(request), logprobs=logprobs)


def _chat_max_tokens(request: ChatRequest) -> int | None:
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise bad_request(
            "max_tokens", "max_tokens: differs from max_completion_tokens, which replaces it; give one"
        )
    return old if new is None else new


def sampling_of_completion(request: CompletionRequest, defaults: dict[str, float | int]) -> SamplingParams:
    """As `sampling_of_chat`."""
    if request.logprobs is not None and request.logprobs < 0:
        raise bad_request("logprobs", f"logprobs: must be 0 or more; got {request.logprobs}")
    max_tokens = request.max_tokens
    if request.echo and max_tokens == 0:
        max_tokens = 1  # the engine gives at least one, which the response leaves out
    logprobs = request.logprobs
    best_of, n = _best_of(request)
    if best_of > n:
        logprobs = logprobs or 0  # by which the best are chosen
    params = _sampling(request, defaults, max_tokens=max_tokens, logprobs=logprobs, n=best_of)
    if max_tokens is None and "max_tokens" not in defaults:
        params.max_tokens = 16  # OpenAI's default for completions
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        params.prompt_logprobs = request.logprobs
    return params


def _best_of(request: CompletionRequest) -> tuple[int, int]:
    n = 1 if request.n is None else request.n
    if request.best_of is None:
        return n, n
    if request.best_of < n:
        raise bad_request("best_of", f"best_of: must be at least n ({n}); got {request.best_of}")
    if request.best_of > n and request.stream:
        raise bad_request("best_of", "best_of: the best are known at the end only, so it cannot be streamed")
    return request.best_of, n


def _sampling(
    request: GenerationRequest,
    defaults: dict[str, float | int],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    n: int | None = None,
) -> SamplingParams:
    fields: dict[str, Any] = dict(defaults)
    for name in _DIRECT:
        if (value := getattr(request, name)) is not None:
            fields[name] = value
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    fields.setdefault("max_tokens", None)
    if n is not None:
        fields["n"] = n
    if request.stream and request.prompt_logprobs is not None:
        raise bad_request("prompt_logprobs", "prompt_logprobs: cannot be streamed")
    fields["logprobs"] = logprobs
    fields["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    params = SamplingParams.from_optional(**fields)
    params.skip_clone = True  # it is nobody else's
    return params


def check_num_prompts(num_prompts: int) -> None:
    """
    Raises:
        ApiError: 400.
    """
    if not 1 <= num_prompts <= MAX_PROMPTS:
        raise bad_request("prompt", f"prompt: must hold 1 to {MAX_PROMPTS} prompts; got {num_prompts}")
