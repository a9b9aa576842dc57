"""Log-probabilities of the default model, outputs and prompts, are transformers' own within 1e-3 (R15).

The reference (`reference/smollm2_logprobs.json`) was made by `reference/make_logprobs.py`, for the prompts and
the greedy tokens of `reference/smollm2.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tercet import FlatLogprobs, RequestOutput, SamplingParams, TokensPrompt
from tests.e2e.test_reference import MAX_LOGIT_GAP, MODEL, REFERENCE, engine

SCORES = json.loads((Path(__file__).parent / "reference" / "smollm2_logprobs.json").read_text())
TOLERANCE = 1e-3
TOP = 5

pytestmark = [
    pytest.mark.skipif(MODEL is None, reason="the default model is not installed (`make install` does)"),
    pytest.mark.timeout(1200),
]


def cases(full_size: bool) -> list[dict[str, Any]]:
    """All of them, or sixteen short ones: prompt, tokens, gaps and scores."""
    assert SCORES["weights_sha256"] == REFERENCE["weights_sha256"]
    both = [{**case, **score} for case, score in zip(REFERENCE["cases"], SCORES["cases"], strict=True)]
    short = sorted(both, key=lambda case: len(case["prompt"]))
    return both if full_size else short[:48:3]


def check_prompt(case: dict[str, Any], output: RequestOutput) -> float:
    """Returns the largest difference."""
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(case["prompt"])
    assert not output.prompt_logprobs[0]
    worst = 0.0
    for place, expected in zip(case["positions"], case["prompt_scores"], strict=True):
        entry = output.prompt_logprobs[place]
        assert entry is not None
        worst = max(worst, abs(entry[case["prompt"][place]].logprob - expected))
    return worst


def check_outputs(case: dict[str, Any], output: RequestOutput) -> float:
    """Returns the largest difference, of values in order and of each token that both report.

    Looks up to the first token that differs, which only a tie may cause.
    """
    child = output.outputs[0]
    assert child.logprobs is not None and len(child.logprobs) == len(case["top"])
    worst = 0.0
    for place, (ids, values) in enumerate(zip(case["top_ids"], case["top"], strict=True)):
        entry = child.logprobs[place]
        assert len(entry) == TOP
        ours = sorted((logprob.logprob for logprob in entry.values()), reverse=True)
        worst = max(worst, *(abs(a - b) for a, b in zip(ours, values, strict=True)))
        expected = dict(zip(ids, values, strict=True))
        shared = entry.keys() & expected.keys()
        assert len(shared) >= TOP - 1  # the last one may be a tie
        worst = max(worst, *(abs(entry[token].logprob - expected[token]) for token in shared))
        if child.token_ids[place] != case["tokens"][place]:
            assert case["gaps"][place] < MAX_LOGIT_GAP
            break
    return worst


def test_the_reference_is_what_it_should_be() -> None:
    assert len(SCORES["cases"]) == len(REFERENCE["cases"]) >= 64
    num_prompt = sum(len(case["positions"]) for case in SCORES["cases"])
    num_outputs = sum(len(case["top"]) for case in SCORES["cases"])
    assert num_prompt > 1000 and num_outputs >= 500
    # Greedy: the token that was generated is the likeliest, unless two are as likely as each other.
    for case, score in zip(REFERENCE["cases"], SCORES["cases"], strict=True):
        for place, ids in enumerate(score["top_ids"]):
            assert ids[0] == case["tokens"][place] or case["gaps"][place] < MAX_LOGIT_GAP


@pytest.mark.parametrize("flat", [False, True])
def test_logprobs_equal_transformers(flat: bool, full_size: bool) -> None:
    chosen = cases(full_size)
    params = SamplingParams(
        temperature=0, max_tokens=len(chosen[0]["top"]), ignore_eos=True, logprobs=TOP, prompt_logprobs=0,
        flat_logprobs=flat,
    )  # fmt: skip
    with engine() as llm:
        prompts = [TokensPrompt(prompt_token_ids=case["prompt"]) for case in chosen]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert isinstance(outputs[0].outputs[0].logprobs, FlatLogprobs if flat else list)
    assert isinstance(outputs[0].prompt_logprobs, FlatLogprobs if flat else list)
    of_prompts = [check_prompt(case, output) for case, output in zip(chosen, outputs, strict=True)]
    of_outputs = [check_outputs(case, output) for case, output in zip(chosen, outputs, strict=True)]
    print(f"largest differences: prompts {max(of_prompts):.1e}, outputs {max(of_outputs):.1e}")
    assert max(of_prompts) < TOLERANCE
    assert max(of_outputs) < TOLERANCE
