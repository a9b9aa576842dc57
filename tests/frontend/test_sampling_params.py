"""Every field is checked for type and range, and the canonical forms are vLLM's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tercet import BeamSearchParams, RequestOutputKind, SamplingParams, ValidationError

NAN, INF = math.nan, math.inf
NOT_NUMBERS = ["1", None, [1], {}, b"1", object(), 1j]
NOT_INTS = [1.5, "1", [1], {}, True, NAN, INF, np.float32(1)]

MALFORMED: dict[str, list[Any]] = {
    "n": [0, -1, 16385, 2**64, None, *NOT_INTS],
    "presence_penalty": [-2.01, 2.01, NAN, INF, -INF, True, 10**400, *NOT_NUMBERS],
    "frequency_penalty": [-2.01, 2.01, NAN, INF, -INF, True, *NOT_NUMBERS],
    "repetition_penalty": [0, -0.1, 1e-30, 0.0009, 1000.1, 1e30, NAN, INF, False, *NOT_NUMBERS],
    "temperature": [-0.1, 2.01, NAN, INF, -INF, True, 10**400, *NOT_NUMBERS],
    "top_p": [0, -0.1, 1.01, NAN, INF, True, *NOT_NUMBERS],
    "top_k": [-2, 2**31, None, *NOT_INTS],
    "min_p": [-0.1, 1.01, NAN, INF, True, *NOT_NUMBERS],
    "seed": [2**64, -(2**63) - 1, *NOT_INTS],
    "max_tokens": [0, -1, 2**31, *NOT_INTS],
    "min_tokens": [-1, 17, 2**31, None, *NOT_INTS],
    "stop": [1, "", [""], ["a", ""], [1], [None], {"a": 1}, b"a", ["x"] * 129, ["x" * 4097], "\ud800"],
    "stop_token_ids": [1, [-1], [2**31], ["1"], [1.0], [True], [None], "12", {}, [1] * 1025],
    "ignore_eos": [1, 0, None, "true", []],
    "logprobs": [-2, 2**31, *NOT_INTS],
    "prompt_logprobs": [-2, 2**31, *NOT_INTS],
    "flat_logprobs": [1, None, "yes"],
    "detokenize": [1, None, "yes"],
    "skip_special_tokens": [1, None, "yes"],
    "spaces_between_special_tokens": [0, None, "no"],
    "include_stop_str_in_output": [0, None, "no"],
    "output_kind": [3, -1, "DELTA", None, 1.0, True],
    "stream_interval": [0, -1, *NOT_INTS],
    "logit_bias": [
        [],
        "x",
        {"1": 1.0},
        {-1: 1.0},
        *({1: bad} for bad in (NAN, INF, "x", 100.1, -1e30)),
        {1.5: 1},
        {True: 1},
    ],
    "allowed_token_ids": [[], 5, [-1], [1.5], ["1"], [2**31], {}],
    "bad_words": ["word", [""], [1], [None], ["x"] * 129, ["x" * 1025], ["\udfff"], {}],
    "skip_reading_prefix_cache": [1, "yes"],
    "skip_clone": [1, None],
    "structured_outputs": [{"json": {}}, object()],
    "thinking_token_budget": [5, 0],
    "repetition_detection": [{"max_pattern_size": 3}],
    "logprob_token_ids": [[1]],
    "prompt_logprob_token_ids": [[[1]]],
    "prompt_logprob_start": [1],
    "trace_decode_token_ids": [[1]],
    "routed_experts_prompt_start": [1],
    "watermarking": [{"key": 1}],
    "extra_args": [{"kv_transfer_params": {}}],
}
CORPUS = [(field, value) for field, values in MALFORMED.items() for value in values]


def test_the_corpus_has_more_than_200_cases() -> None:
    assert len(CORPUS) > 200


@pytest.mark.parametrize(("field", "value"), CORPUS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(CORPUS)])
def test_malformed_value_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field.startswith(field)
    assert len(str(caught.value)) < 300  # a huge value is not repeated in the message


@pytest.mark.parametrize(("field", "value"), CORPUS, ids=[f"{f}-{i}" for i, (f, _) in enumerate(CORPUS)])
def test_malformed_value_set_later_is_refused_by_name(field: str, value: Any) -> None:
    params = SamplingParams()
    setattr(params, field, value)
    with pytest.raises(ValidationError) as caught:
        params.validate()
    assert caught.value.field.startswith(field)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logprobs) == (16, 0, None, None)
    assert (params.detokenize, params.skip_special_tokens, params.ignore_eos) == (True, True, False)
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert repr(params) == "SamplingParams()"


@pytest.mark.parametrize("temperature", [0, 0.0, 9e-6])
def test_greedy_takes_no_notice_of_other_filters(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.5, top_k=5, min_p=0.5)
    assert params.greedy
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


def test_greedy_has_one_completion_only() -> None:
    with pytest.raises(ValidationError, match="n: must be 1"):
        SamplingParams(temperature=0, n=2)


def test_small_temperature_is_raised() -> None:
    assert SamplingParams(temperature=0.001).temperature == 0.01
    assert SamplingParams(temperature=0.01).temperature == 0.01
    assert SamplingParams(temperature=0.02).temperature == 0.02


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 16384),
        ("temperature", 2),
        ("top_p", 1),
        ("presence_penalty", -2),
        ("frequency_penalty", 2.0),
        ("repetition_penalty", 0.001),
        ("repetition_penalty", 1000),
        ("logit_bias", {1: 100, 2: -100.0}),
        ("seed", 2**64 - 1),
        ("seed", -(2**63)),
        ("max_tokens", None),
        ("max_tokens", np.int64(5)),
        ("min_p", np.float32(0.5)),
        ("logprobs", -1),
        ("stop", ["x" * 4096] * 128),
        ("bad_words", ["x" * 1024] * 128),
    ],
)
def test_values_at_the_limit_pass(field: str, value: Any) -> None:
    SamplingParams(**{field: value})


def test_canonical_forms() -> None:
    params = SamplingParams(top_k=-1, seed=-1, stop="end", stop_token_ids=(3, 4, 3), output_kind=1)  # type: ignore[arg-type]
    assert params.top_k == 0
    assert params.seed is None
    assert params.stop == ["end"]
    assert params.stop_token_ids == [3, 4]
    assert params.output_kind is RequestOutputKind.DELTA


def test_stop_strings_need_text() -> None:
    with pytest.raises(ValidationError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_min_tokens_is_at_most_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(ValidationError, match="min_tokens"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_from_optional_takes_json() -> None:
    params = SamplingParams.from_optional(
        temperature=None, logit_bias={"5": 500, "6": -500.0}, n=None, top_p=0.5
    )
    assert params.temperature == 1.0
    assert params.logit_bias == {5: 100.0, 6: -100.0}
    assert params.top_p == 0.5
    assert params.max_tokens == 16
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None


@pytest.mark.parametrize("logit_bias", [{"x": 1.0}, {None: 1.0}, [1], {"1": NAN}])
def test_from_optional_refuses_bad_logit_bias(logit_bias: Any) -> None:
    with pytest.raises(ValidationError, match="logit_bias"):
        SamplingParams.from_optional(logit_bias=logit_bias)


def test_from_optional_refuses_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="best_of"):
        SamplingParams.from_optional(best_of=3)


def test_clone_shares_nothing_that_changes() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 1.0}, bad_words=["x"])
    copy = params.clone()
    assert copy == params
    assert copy.stop is not params.stop
    assert copy.logit_bias is not params.logit_bias
    quick = SamplingParams(skip_clone=True)
    assert quick.clone() is quick


@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 0},
        {"beam_width": 1.5},
        {"max_tokens": 0},
        {"temperature": 0.7},
        {"length_penalty": NAN},
        {"ignore_eos": 1},
    ],
)
def test_beam_search_params_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})
