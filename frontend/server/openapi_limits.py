"""What single parameters may be, as JSON Schema says it: for the OpenAPI document.

The numbers are those by which requests are checked (`sampling_ranges`, `validation`, `limits`). Bounds that depend on
the engine, such as its vocabulary or its context length, are left to the check itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tercet import sampling_ranges as ranges
from tercet.frontend import validation as v
from tercet.frontend.server.limits import MAX_MESSAGES, MAX_REQUEST_ID_CHARS

REQUEST_ID: Final = {
    "type": "string",
    "pattern": r"^[\x21-\x7e]+$",
    "minLength": 1,
    "maxLength": MAX_REQUEST_ID_CHARS,
}


def _between(bounds: tuple[float, float]) -> dict[str, Any]:
    return {"minimum": bounds[0], "maximum": bounds[1]}


def _ints(low: int, high: int = v.MAX_INT32) -> dict[str, Any]:
    return {"minimum": low, "maximum": high}


_TOKEN_ID: Final = {"type": "integer", **_ints(0)}

LIMITS: Final[Mapping[str, Mapping[str, Any]]] = {
    "allowed_token_ids": {"minItems": 1, "items": _TOKEN_ID},
    "bad_words": {
        "maxItems": v.MAX_BAD_WORDS,
        "items": {"type": "string", "minLength": 1, "maxLength": v.MAX_BAD_WORD_CHARS},
    },
    "best_of": _ints(1, v.MAX_CHILDREN),
    "cache_salt": {"minLength": 1, "maxLength": v.MAX_ID_CHARS},
    "frequency_penalty": _between(ranges.PENALTY),
    "logit_bias": {"maxProperties": v.MAX_LOGIT_BIASES},
    "logprobs": _ints(0),
    "max_completion_tokens": _ints(1),
    "max_output_tokens": _ints(1),
    "max_tokens": _ints(1),
    "min_p": _between((0, 1)),
    "min_tokens": _ints(0),
    "n": _ints(1, v.MAX_CHILDREN),
    "presence_penalty": _between(ranges.PENALTY),
    "priority": _ints(-(2**31)),
    "prompt_logprobs": _ints(-1),
    "repetition_penalty": _between(ranges.REPETITION_PENALTY),
    "request_id": REQUEST_ID,
    "seed": _ints(-(2**63), v.MAX_SEED),
    "stop": {
        "minLength": 1,
        "maxLength": v.MAX_STOP_STRING_CHARS,
        "maxItems": v.MAX_STOP_STRINGS,
        "items": {"type": "string", "minLength": 1, "maxLength": v.MAX_STOP_STRING_CHARS},
    },
    "stop_sequences": {
        "maxItems": v.MAX_STOP_STRINGS,
        "items": {"type": "string", "minLength": 1, "maxLength": v.MAX_STOP_STRING_CHARS},
    },
    "stop_token_ids": {"maxItems": v.MAX_STOP_TOKEN_IDS, "items": _TOKEN_ID},
    "stream_interval": _ints(1),
    "temperature": _between(ranges.TEMPERATURE),
    "tokens": {"items": _TOKEN_ID},
    "top_k": _ints(-1),
    "top_logprobs": _ints(0),
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
}
"""Parameter -> keywords, each for the types of JSON to which it applies; of every request that has it."""

LIMITS_OF: Final[Mapping[tuple[str, str], Mapping[str, Any]]] = {
    ("ChatRequest", "messages"): {"minItems": 1, "maxItems": MAX_MESSAGES},
    ("MessagesRequest", "messages"): {"minItems": 1, "maxItems": MAX_MESSAGES},
    ("CompletionRequest", "max_tokens"): _ints(0),  # 0 with echo: the prompt alone
    ("CompletionRequest", "prompt"): {"minItems": 1},
}
"""(request, parameter) -> what holds there in place of `LIMITS`."""

REQUIRED: Final = {"CompletionRequest": "prompt", "ResponsesRequest": "input"}
"""Parameters that the types leave open, and the routes ask for."""

_KEYWORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "integer": ("minimum", "maximum", "exclusiveMinimum"),
    "number": ("minimum", "maximum", "exclusiveMinimum"),
    "string": ("minLength", "maxLength", "pattern"),
    "array": ("minItems", "maxItems", "items"),
    "object": ("maxProperties",),
}


def bounded(schema: dict[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one parameter with the keywords of `LIMITS` put where they apply."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [bounded(one, limits) for one in schema["anyOf"]]}
    applicable = _KEYWORDS.get(schema.get("type", ""), ())
    return {**schema, **{name: limits[name] for name in applicable if name in limits}}


def without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a parameter that must be given."""
    kept = [one for one in schema["anyOf"] if one != {"type": "null"}]
    return kept[0] if len(kept) == 1 else {"anyOf": kept}
