"""Log-probabilities through the whole engine are transformers' own within 1e-3 (R15)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet import LLM, SamplingParams, TokensPrompt

VOCAB_SIZE = 512
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("llama")
    hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    # A budget below the prompts' lengths: their log-probabilities come in pieces.
    engine = LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        dtype="float32",
        max_num_seqs=16,
        max_num_batched_tokens=33,
        num_threads=1,
    )
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Any:
    import transformers as hf

    return hf.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(1, VOCAB_SIZE) for _ in range(n)] for n in (1, 2, 16, 17, 33, 80, 120)]


def check_position(entries: dict[int, Any], logits: torch.Tensor, token: int, top: int) -> None:
    """entries: token id -> Logprob of one position."""
    expected = logits.log_softmax(-1)
    assert token in entries
    best = expected.topk(top).indices.tolist()
    assert set(entries) == {token, *best}
    for token_id, entry in entries.items():
        assert abs(entry.logprob - float(expected[token_id])) < TOLERANCE
        assert entry.rank == 1 + int((expected > expected[token_id]).sum())


@torch.inference_mode()
def test_logprobs_of_outputs_and_prompts(llm: LLM, reference: Any) -> None:
    params = SamplingParams(
        temperature=1.0, top_p=0.9, seed=3, logprobs=5, prompt_logprobs=3, max_tokens=12, ignore_eos=True,
        detokenize=False, frequency_penalty=1.0,
    )  # fmt: skip
    given = prompts()
    outputs = llm.generate([TokensPrompt(prompt_token_ids=p) for p in given], params, use_tqdm=False)
    for prompt, output in zip(given, outputs, strict=True):
        child = output.outputs[0]
        tokens = list(child.token_ids)
        logits = reference(torch.tensor([prompt + tokens])).logits[0]
        assert child.logprobs is not None and len(child.logprobs) == len(tokens) == 12
        for i, token in enumerate(tokens):
            # The stage is 'raw': neither penalties nor temperature nor top_p show in the values.
            check_position(child.logprobs[i], logits[len(prompt) - 1 + i], token, 5)
        total = sum(entry[token].logprob for entry, token in zip(child.logprobs, tokens, strict=True))
        assert child.cumulative_logprob == pytest.approx(total, abs=1e-4)
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for i in range(1, len(prompt)):
            entries = output.prompt_logprobs[i]
            assert entries is not None
            check_position(entries, logits[i - 1], prompt[i], 3)


def test_rows_with_and_without_logprobs_share_a_batch(llm: LLM) -> None:
    prompt = TokensPrompt(prompt_token_ids=prompts()[3])
    counts = [None, 0, 1, 20, None, 7]
    params = [SamplingParams(temperature=0, logprobs=k, max_tokens=6, ignore_eos=True) for k in counts]
    outputs = llm.generate([prompt] * len(counts), params, use_tqdm=False)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    for k, output in zip(counts, outputs, strict=True):
        logprobs = output.outputs[0].logprobs
        if k is None:
            assert logprobs is None
        else:
            assert logprobs is not None
            # Greedy: the chosen token is the first of the top k.
            assert [len(entry) for entry in logprobs] == [max(k, 1)] * 6
