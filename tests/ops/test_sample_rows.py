"""The reference of `sample_rows` against the sampler and the batch, whose work it does by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tercet.ipc.messages import Finish
from tercet.ops.sample_rows import FINISH_ERROR, FINISH_LENGTH, FINISH_NONE, Variant, sample_rows
from tests.ops.sample_rows_harness import Rig, normal_logits, random_row

VOCAB = 211


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("restricted", [False, True])
def test_draws_and_advances_as_the_sampler_does(edits: bool, restricted: bool) -> None:
    for seed in range(12):
        rng = np.random.default_rng([seed, edits, restricted])
        rows = [random_row(rng, VOCAB, edits=edits, restricted=restricted) for _ in range(14)]
        rig = Rig(rows, VOCAB, max_tokens=6, seed=seed)
        rig.freeze(2, 9)
        logits = normal_logits(rng, 14, VOCAB)
        logits[3, 40], logits[5, 7], logits[6] = torch.nan, torch.inf, -torch.inf
        rig.assert_like(rig.step(sample_rows, logits), logits)


def test_padding_and_frozen_lines_say_nothing_and_change_nothing() -> None:
    rng = np.random.default_rng(3)
    rig = Rig([random_row(rng, VOCAB, edits=True, restricted=True) for _ in range(4)], VOCAB)
    rig.freeze(0, 1, 2, 3)
    got = rig.step(sample_rows, normal_logits(rng, 6, VOCAB), lines=[-1, 2, 0, -1, 1, 3])
    assert not got.out_3S.any()
    assert torch.equal(got.lengths_R, rig.batch.lengths_R)
    assert torch.equal(got.tokens_RM, rig.batch.history_RM)


def test_soft_cap_comes_first() -> None:
    rng = np.random.default_rng(4)
    rows = [random_row(rng, VOCAB, edits=True, restricted=True) for _ in range(10)]
    rig = Rig(rows, VOCAB)
    logits = normal_logits(rng, 10, VOCAB, scale=20.0)
    rig.assert_like(rig.step(sample_rows, logits, soft_cap=5.0), logits, soft_cap=5.0)
    assert rig.state.variant(rig.places) is Variant.FULL


def test_codes_are_those_of_the_protocol() -> None:
    assert (FINISH_NONE, FINISH_LENGTH, FINISH_ERROR) == (Finish.NONE, Finish.LENGTH, Finish.ERROR)
