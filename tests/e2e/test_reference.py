"""Greedy tokens of the default model equal transformers' own, whatever the engine does to produce them.

The reference (`reference/smollm2.json`) was made by transformers in float32; `reference/make_reference.py` says how.
A first difference passes only where the reference's two best logits are closer than float32 rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tercet import LLM, RequestOutput, SamplingParams, TokensPrompt
from tercet.errors import ModelNotFoundError
from tercet.frontend.input_processor import derive_child_seed
from tercet.model_source import resolve_model

REFERENCE = json.loads((Path(__file__).parent / "reference" / "smollm2.json").read_text())
MAX_LOGIT_GAP = 1e-4
MAX_MODEL_LEN = 2048

try:
    MODEL: str | None = str(resolve_model(None).path)
except ModelNotFoundError:
    MODEL = None
pytestmark = [
    pytest.mark.skipif(MODEL is None, reason="the default model is not installed (`make install` does)"),
    pytest.mark.timeout(1200),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain loop": {"async_scheduling": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "tiny budget": {"max_num_batched_tokens": 24, "max_num_seqs": 24, "enable_prefix_caching": False},
    # The pool holds one request of full length, and several must give way again and again.
    "forced preemption": {"num_gpu_blocks_override": MAX_MODEL_LEN // 16 + 2, "max_num_seqs": 64},
}
SHORT = {"forced preemption": {"num_gpu_blocks_override": 34, "max_model_len": 512, "max_num_seqs": 64}}


@contextmanager
def engine(**overrides: Any) -> Iterator[LLM]:
    args = {
        "model": MODEL,
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": 1 << 30,
    }
    llm = LLM(**{**args, **overrides})
    try:
        yield llm
    finally:
        llm.shutdown()


def cases(full_size: bool) -> list[dict[str, Any]]:
    """All of them, or twelve short ones with fewer tokens."""
    if full_size:
        return list(REFERENCE["cases"])
    short = sorted(REFERENCE["cases"], key=lambda case: len(case["prompt"]))[:48:4]
    return [{**case, "tokens": case["tokens"][:16]} for case in short]


def generate(llm: LLM, chosen: list[dict[str, Any]]) -> list[RequestOutput]:
    params = SamplingParams(
        temperature=0, max_tokens=len(chosen[0]["tokens"]), ignore_eos=True, detokenize=False
    )
    prompts = [TokensPrompt(prompt_token_ids=case["prompt"]) for case in chosen]
    return llm.generate(prompts, params, use_tqdm=False)


def assert_equal(chosen: list[dict[str, Any]], outputs: list[RequestOutput]) -> None:
    for case, output in zip(chosen, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == len(case["tokens"])
        pairs = zip(tokens, case["tokens"], strict=True)
        first = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if first is not None:
            gap = case["gaps"][first]
            print(f"prompt of {len(case['prompt'])} tokens differs at output {first}: logit gap {gap}")
            assert gap < MAX_LOGIT_GAP, f"prompt of {len(case['prompt'])} tokens, output {first}, gap {gap}"


def test_reference_belongs_to_these_weights() -> None:
    assert MODEL is not None
    assert hashlib.sha256(Path(MODEL).read_bytes()).hexdigest() == REFERENCE["weights_sha256"]
    assert len(REFERENCE["cases"]) >= 64
    assert min(len(c["prompt"]) for c in REFERENCE["cases"]) == 1
    assert max(len(c["prompt"]) for c in REFERENCE["cases"]) == 1500


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_tokens_equal_transformers(name: str, full_size: bool) -> None:
    chosen = cases(full_size)
    settings = SETTINGS[name] if full_size else SHORT.get(name, SETTINGS[name])
    with engine(**settings) as llm:
        outputs = generate(llm, chosen)
        assert_equal(chosen, outputs)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        if name == "forced preemption":
            assert metrics["tercet:num_preemptions"].value > 0
        if name == "default":  # again, now from the cache
            again = generate(llm, chosen)
            assert_equal(chosen, again)
            assert any(output.num_cached_tokens for output in again)


def test_children_equal_single_requests_with_their_seeds() -> None:
    prompt = TokensPrompt(prompt_token_ids=REFERENCE["cases"][0]["prompt"])
    with engine() as llm:
        both = llm.generate(
            prompt, SamplingParams(n=2, seed=7, temperature=1.0, max_tokens=24), use_tqdm=False
        )
        assert both[0].outputs[0].token_ids != both[0].outputs[1].token_ids
        for child in range(2):
            seed = derive_child_seed(7, child)
            single = llm.generate(
                prompt, SamplingParams(seed=seed, temperature=1.0, max_tokens=24), use_tqdm=False
            )
            assert single[0].outputs[0].token_ids == both[0].outputs[child].token_ids
