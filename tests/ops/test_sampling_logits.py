"""Changes of logits and log-probabilities against plain Python."""

import math

import numpy as np
import pytest
import torch

from tercet.ops.logits import add_at, apply_penalties, mask_at, match_bad_words, unpack_bits
from tercet.ops.logprobs import LogprobColumns, compute_prompt_logprobs, gather_logprobs
from tests.ops.sampling_reference import Row, processed

VOCAB = 37


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 4, (rows, VOCAB)).astype(np.float32))


def test_add_at_changes_named_logits_and_no_other() -> None:
    logits = random_logits(4)
    changed = logits.clone()
    ids = torch.tensor([[0, 5, -1], [36, -1, -1]], dtype=torch.int32)
    values = torch.tensor([[1.5, -2.0, 0.0], [3.0, 0.0, 0.0]])
    add_at(changed, torch.tensor([3, 1]), ids, values)
    logits[3, 0] += 1.5
    logits[3, 5] -= 2.0
    logits[1, 36] += 3.0
    assert torch.equal(changed, logits)


def test_mask_at_leaves_token_zero_alone_where_ids_are_padding() -> None:
    logits = random_logits(2)
    changed = logits.clone()
    ids = torch.tensor([[-1, 4, 4], [0, 9, -1]], dtype=torch.int32)
    mask_at(changed, torch.tensor([0, 1]), ids, torch.tensor([[True, True, True], [False, True, True]]))
    logits[0, 4] = logits[1, 9] = -torch.inf
    assert torch.equal(changed, logits)


@pytest.mark.parametrize("vocab_size", [1, 8, 37, 64])
def test_unpack_bits_undoes_packing(vocab_size: int) -> None:
    allowed = np.random.default_rng(vocab_size).random((5, vocab_size)) < 0.5
    packed = torch.from_numpy(np.packbits(allowed, axis=1, bitorder="little"))
    assert np.array_equal(unpack_bits(packed, vocab_size).numpy(), allowed)


def test_penalties_equal_the_definition() -> None:
    rng = np.random.default_rng(8)
    logits = random_logits(12, seed=9)
    logits[:, 3] = -torch.inf  # masked before
    rows = [
        Row(
            prompt=rng.integers(0, VOCAB, 6).tolist(),
            outputs=rng.integers(0, VOCAB, int(rng.integers(0, 40))).tolist(),
            repetition=float(rng.choice([1.0, 0.7, 1.3, 4.0])),
            frequency=float(rng.uniform(-2, 2)),
            presence=float(rng.uniform(-2, 2)),
        )
        for _ in range(12)
    ]
    seen = torch.zeros(12, VOCAB, dtype=torch.int32)
    for i, row in enumerate(rows):
        seen[i, row.prompt] = 1
        for token in row.outputs:
            seen[i, token] += 2
    changed = logits.clone()
    columns = [
        torch.tensor([getattr(row, name) for row in rows]).unsqueeze(1)
        for name in ("repetition", "frequency", "presence")
    ]
    apply_penalties(changed, seen, *columns)
    for i, row in enumerate(rows):
        assert changed[i].tolist() == pytest.approx(processed(logits[i].numpy(), row).tolist(), rel=1e-5)


def test_bad_words_match_the_end_of_the_output_only() -> None:
    words = torch.tensor([[[9, 8, 7], [9, 8, -1], [5, -1, -1], [-1, -1, -1]]], dtype=torch.int32)
    history = torch.zeros(2, 10, dtype=torch.int32)

    def completed(tokens: list[int], prompt_len: int) -> list[bool]:
        history[1, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        lengths = torch.tensor([len(tokens)])
        result: list[bool] = match_bad_words(
            words, history, torch.tensor([1]), lengths, torch.tensor([prompt_len])
        )[0].tolist()
        return result

    assert completed([1, 7, 8], prompt_len=1) == [True, True, True, False]
    assert completed([1, 7, 8], prompt_len=2) == [False, True, True, False]  # 7 is of the prompt
    assert completed([1, 7, 8], prompt_len=3) == [False, False, True, False]
    assert completed([1, 8, 7], prompt_len=1) == [False, False, True, False]
    assert completed([8], prompt_len=1) == [False, False, True, False]


def check_columns(columns: LogprobColumns, logits: torch.Tensor, chosen: torch.Tensor, k: int) -> None:
    assert columns.token_ids.shape == columns.logprobs.shape == (len(chosen), 1 + k)
    for i, line in enumerate(logits.double().tolist()):
        total = math.log(sum(math.exp(x) for x in line))
        ids, logprobs = columns.token_ids[i].tolist(), columns.logprobs[i].tolist()
        assert ids[0] == chosen[i]
        assert logprobs == pytest.approx([line[token] - total for token in ids], abs=1e-5)
        assert logprobs[1:] == pytest.approx(sorted((x - total for x in line), reverse=True)[:k], abs=1e-5)
        assert len(set(ids[1:])) == k
        assert columns.rank[i] == 1 + sum(x > line[ids[0]] for x in line)


@pytest.mark.parametrize("k", [0, 1, 5, VOCAB])
def test_logprobs_equal_the_definition(k: int) -> None:
    logits = random_logits(9, seed=k)
    logits[4] = logits[4].round()  # ties
    chosen = torch.arange(9, dtype=torch.int32) * 4
    check_columns(gather_logprobs(logits, chosen, k), logits, chosen, k)


@pytest.mark.parametrize("rows", [1, 300])
def test_prompt_logprobs_equal_the_definition(rows: int) -> None:
    logits = random_logits(rows)
    targets = torch.arange(rows) % VOCAB
    check_columns(compute_prompt_logprobs(logits, targets, 3), logits, targets, 3)
