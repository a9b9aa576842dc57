"""Beam search equals an exhaustive search where the beams are wide enough to hold everything."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import Any

import msgspec
import numpy as np
import pytest

from tercet import AsyncLLM, BeamSearchParams, ValidationError
from tercet.frontend.beam_search import BeamSearchOutput, beam_search
from tercet.ipc.messages import AddRequest, Finish
from tests.frontend.fake_core import EOS, FakeCore, logprob_columns, step_outputs
from tests.frontend.text_engine import ids_of, make_bundle, make_tokenizer

LETTERS = [ids_of(char)[0] for char in "abc"]
TOKENS = [*LETTERS, EOS]


def next_logprobs(last: int) -> dict[int, float]:
    """A small language model: the next token depends on the last one."""
    logits = np.array([math.sin(last * 3 + token * 5) for token in TOKENS])
    values = logits - np.log(np.exp(logits).sum())
    return {token: float(np.float32(value)) for token, value in zip(TOKENS, values, strict=True)}


def answer(message: AddRequest) -> list[msgspec.Struct]:
    values = next_logprobs(int(message.token_ids[-1]))
    ranked = sorted(values.items(), key=lambda item: -item[1])
    assert message.sampling.logprobs is not None
    best = ranked[: message.sampling.logprobs]
    columns = logprob_columns([(message.handle, [ranked[0], *best], 1)])
    end = {message.handle: Finish.LENGTH}
    return [step_outputs({message.handle: [ranked[0][0]]}, finish=end, logprobs=columns)]


def search(prompt: Any, **params: Any) -> BeamSearchOutput:
    async def run() -> BeamSearchOutput:
        with FakeCore(make_bundle(), answer=answer) as core:
            async with AsyncLLM.connect(core.address) as engine:
                return await beam_search(engine, prompt, BeamSearchParams(**params))

    return asyncio.run(run())


def exhaustive(prompt: list[int], length: int, penalty: float) -> list[tuple[float, list[int]]]:
    found = []
    sequences: list[tuple[int, ...]] = []
    for count in range(length + 1):
        for letters in itertools.product(LETTERS, repeat=count):
            sequences += [(*letters, EOS)] if count < length else [letters]
    for sequence in sequences:
        total, last = 0.0, prompt[-1]
        for token in sequence:
            total += next_logprobs(last)[token]
            last = token
        found.append((total / len(sequence) ** penalty, list(sequence)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_wide_beams_find_the_likeliest(penalty: float) -> None:
    prompt = [LETTERS[0], LETTERS[1]]
    output = search(
        prompt, beam_width=10, max_tokens=2, length_penalty=penalty, include_stop_str_in_output=True
    )
    expected = exhaustive(prompt, 2, penalty)[:10]
    assert [s.tokens[2:] for s in output.sequences] == [tokens for _, tokens in expected]
    for sequence, (score, tokens) in zip(output.sequences, expected, strict=True):
        assert sequence.cum_logprob / len(tokens) ** penalty == pytest.approx(score, rel=1e-5)
        assert len(sequence.logprobs) == len(tokens)
        assert sequence.finish_reason == ("stop" if tokens[-1] == EOS else "length")
        assert sequence.text == make_tokenizer().decode(sequence.tokens, skip_special_tokens=True)


def test_end_token_is_left_out_unless_asked_for() -> None:
    sequences = search("a", beam_width=10, max_tokens=2).sequences
    ended = [s for s in sequences if s.finish_reason == "stop"]
    assert ended
    assert all(EOS not in s.tokens and s.stop_reason == EOS for s in ended)


def test_ignore_eos() -> None:
    sequences = search("a", beam_width=3, max_tokens=3, ignore_eos=True).sequences
    assert all(len(s.tokens) == 4 and s.finish_reason == "length" for s in sequences)


def test_results_are_as_many_as_beams_best_first() -> None:
    sequences = search("abc", beam_width=4, max_tokens=5).sequences
    assert len(sequences) == 4


@pytest.mark.parametrize(("params", "field"), [({"beam_width": 11}, "beam_width")])
def test_more_beams_than_logprobs_are_refused(params: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        search("a", **{"beam_width": 2, "max_tokens": 2, **params})
    assert caught.value.field == field
