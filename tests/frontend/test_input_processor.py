"""What reaches the wire: checked against the model, tokenized, seeded."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tercet import SamplingParams, ValidationError
from tercet.core_proc.checks import check_request
from tercet.frontend.input_processor import PreparedRequest, derive_child_seed
from tercet.frontend.inputs import parse_prompt
from tests.frontend.fake_core import EOS, VOCAB_SIZE, make_limits, make_model
from tests.frontend.text_engine import ids_of, make_inputs, make_tokenizer


def prepare(prompt: Any = (1, 2, 3), priority: int = 0, **params: Any) -> PreparedRequest:
    inputs = make_inputs(make_tokenizer())
    return inputs.prepare(parse_prompt(prompt), SamplingParams(**params), arrival_s=1.5, priority=priority)


def test_text_becomes_tokens() -> None:
    prepared = prepare("Hello there")
    assert prepared.prompt == "Hello there"
    assert prepared.prompt_token_ids == make_tokenizer().encode("Hello there")
    assert prepared.token_array.tolist() == prepared.prompt_token_ids
    assert prepared.token_array.dtype == np.int32


def test_token_ids_win_over_text() -> None:
    prepared = prepare({"prompt": "for show", "prompt_token_ids": [4, 5]})
    assert (prepared.prompt, prepared.prompt_token_ids) == ("for show", [4, 5])


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint16)])
def test_token_ids_in_any_container(ids: Any) -> None:
    assert prepare(ids).prompt_token_ids == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ([], "prompt_token_ids"),
        ("", "prompt"),
        ([-1], "prompt_token_ids"),
        ([VOCAB_SIZE], "prompt_token_ids"),
        ([2**31], "prompt_token_ids"),
        ([2**64], "prompt_token_ids"),
        ([-(2**70)], "prompt_token_ids"),
        ([1.0], "prompt_token_ids"),
        ([1, None], "prompt_token_ids"),
        (["a"], "prompt_token_ids"),
        ([True, False], "prompt_token_ids"),
        ([[1], [2]], "prompt_token_ids"),
        ([[1], [2, 3]], "prompt_token_ids"),
        ([1] * 512, "prompt_token_ids"),
        (np.zeros((2, 2), np.int32), "prompt_token_ids"),
        ("a " * 512, "prompt"),
        ("a" * 10**6, "prompt"),
    ],
)
def test_bad_prompts_are_refused_by_name(prompt: Any, field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        prepare(prompt)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    prepared = prepare([1] * 511, max_tokens=100)
    assert prepared.sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"n": 65}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"allowed_token_ids": [0, VOCAB_SIZE]}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS], "min_tokens": 3}, "allowed_token_ids"),
        ({"allowed_token_ids": [EOS, 9], "stop_token_ids": [9], "min_tokens": 1}, "allowed_token_ids"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ({"bad_words": [f"word{i}" for i in range(100)]}, "bad_words"),
    ],
)
def test_parameters_are_checked_against_the_model(params: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        prepare(**params)
    assert caught.value.field == field


@pytest.mark.parametrize("priority", [2**31, -(2**31) - 1, 1.5, "1", True, None])
def test_priority_is_checked(priority: Any) -> None:
    with pytest.raises(ValidationError, match="priority"):
        prepare(priority=priority)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [("text", {}, "prompt"), ([1], {"stop": "x"}, "stop"), ([1], {"bad_words": ["x"]}, "bad_words")],
)
def test_without_a_tokenizer_text_is_refused(prompt: Any, params: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        make_inputs(None).prepare(parse_prompt(prompt), SamplingParams(**params), arrival_s=0.0)
    assert caught.value.field == field


def test_max_tokens_none_is_up_to_the_context() -> None:
    assert prepare([1] * 12, max_tokens=None).sampling.max_tokens == 500
    assert prepare([1] * 12, max_tokens=1000).sampling.max_tokens == 500
    assert prepare([1] * 12, max_tokens=10).sampling.max_tokens == 10


def test_eos_is_the_models_unless_ignored() -> None:
    assert prepare().sampling.eos_token_ids == [EOS]
    assert prepare(ignore_eos=True).sampling.eos_token_ids == []


def test_bad_words_are_blocked_at_the_start_and_after_a_space() -> None:
    sequences = prepare(bad_words=["over"]).sampling.bad_words
    assert sequences == [ids_of("over"), ids_of(" over")]


def test_logprobs_minus_one_is_the_whole_vocabulary() -> None:
    tokenizer = make_tokenizer()
    inputs = make_inputs(tokenizer)
    inputs.limits = make_limits(max_logprobs=VOCAB_SIZE)
    prepared = inputs.prepare(parse_prompt([1]), SamplingParams(logprobs=-1), arrival_s=0.0)
    assert prepared.sampling.logprobs == VOCAB_SIZE


def test_prompt_logprobs_do_not_read_the_prefix_cache() -> None:
    assert prepare().read_prefix_cache
    assert not prepare(prompt_logprobs=0).read_prefix_cache
    assert not prepare(skip_reading_prefix_cache=True).read_prefix_cache


# ---- seeds


def test_a_given_seed_is_kept_and_children_derive_theirs() -> None:
    assert prepare(seed=42).seeds == [42]
    many = prepare(seed=42, n=4).seeds
    assert many == [derive_child_seed(42, index) for index in range(4)]
    assert len(set(many)) == 4
    # So each child can be had alone:
    assert [prepare(seed=seed).seeds for seed in many] == [[seed] for seed in many]


def test_child_seeds_are_what_other_implementations_must_compute() -> None:
    # SplitMix64 from seed 0: its first two outputs, as published with the algorithm.
    assert derive_child_seed(0, 1) == 0xE220A8397B1DCDAF
    assert derive_child_seed(0, 2) == 0x6E789E6AA1B965F4


def test_negative_seeds_are_taken_as_their_bits() -> None:
    assert prepare(seed=-5).seeds == [2**64 - 5]


def test_unseeded_requests_draw_64_bits() -> None:
    seeds = {prepare().seeds[0] for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) > 2**60


# ---- the wire


def test_what_passes_here_passes_the_core() -> None:
    prepared = prepare(
        "a prompt",
        priority=-3,
        n=3,
        seed=1,
        stop_token_ids=[7],
        logit_bias={4: -100.0},
        allowed_token_ids=[1, 2],
        bad_words=["over"],
        logprobs=20,
        top_k=VOCAB_SIZE + 5,
        min_tokens=3,
    )
    message = prepared.message(epoch=7, handle=100)
    check_request(message, make_model(), make_limits())
    assert (message.epoch, message.handle, message.prompt_len) == (7, 100, len(prepared.prompt_token_ids))
    assert (message.priority, len(message.seeds), message.arrival_s) == (-3, 3, 1.5)
    assert message.sampling.top_k == 0  # more than there are is all
    assert msgspec.structs.asdict(message.sampling)["temperature"] == 1.0
