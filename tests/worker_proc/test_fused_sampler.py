"""The sampler of device steps: its plans, its tables and what makes captured launches void."""

from __future__ import annotations

import numpy as np
import torch

from tercet.ipc.messages import Finish, Sampling
from tercet.ops.sample_rows import Variant
from tercet.worker_proc.device_batch import DeviceBatch
from tercet.worker_proc.sampler import FusedSampler
from tercet.worker_proc.sampling_state import SamplingState

CPU = torch.device("cpu")
VOCAB = 50


def make() -> tuple[SamplingState, FusedSampler]:
    state = SamplingState(8, VOCAB, 30, CPU)
    return state, FusedSampler(state)


def admit(state: SamplingState, row: int, **fields: object) -> None:
    sampling = Sampling(max_tokens=9, **fields)  # type: ignore[arg-type]
    state.admit(row, sampling, 5, 2, np.array([1, 2], np.int32))


def rows(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_variants_follow_from_the_most_demanding_row() -> None:
    state, sampler = make()
    admit(state, 0, temperature=0.0)
    admit(state, 1, temperature=1.0)
    admit(state, 2, temperature=1.0, top_p=0.5)
    admit(state, 3, temperature=0.0, presence_penalty=0.5)
    admit(state, 4, temperature=0.0, bad_words=[[3]])
    expected = {(0,): Variant.GREEDY, (0, 1): Variant.TEMPERATURE, (1, 2): Variant.FULL}
    expected |= {(0, 3): Variant.FULL, (4,): Variant.FULL}
    assert {key: sampler.plan(rows(*key)).variant for key in expected} == expected


def test_logprobs_are_planned() -> None:
    state, sampler = make()
    admit(state, 4, temperature=0.0, logprobs=3)
    admit(state, 6, temperature=0.0)
    assert sampler.plan(rows(6)).logprobs is None
    planned = sampler.plan(rows(6, 4)).logprobs
    assert planned is not None
    assert planned.k == 3
    assert planned.subset.position_b.tolist() == [1]


def test_layout_changes_when_a_table_moves_and_only_then() -> None:
    state, sampler = make()
    admit(state, 0, temperature=1.0, stop_token_ids=[4])
    sampler.plan(rows(0))
    layout, tables = sampler.layout_version, state.tables()
    admit(state, 1, temperature=0.3, stop_token_ids=[5])
    sampler.plan(rows(0, 1))
    assert sampler.layout_version == layout
    assert state.tables() is tables
    assert tables.stop_ids[:2].tolist() == [[4], [5]]  # in place
    for row, fields in enumerate(
        (
            {"stop_token_ids": [5, 6, 7]},
            {"bad_words": [[1, 2]]},
            {"presence_penalty": 1.0},
            {"allowed_token_ids": np.array([3], np.int32)},
        ),
        start=2,
    ):
        admit(state, row, temperature=0.0, **fields)
        sampler.plan(rows(row))
        assert sampler.layout_version == layout + row - 1


def test_a_draw_advances_the_batch() -> None:
    state, sampler = make()
    batch = DeviceBatch(8, 30, 16, CPU)
    admit(
        state,
        3,
        temperature=0.0,
        stop_token_ids=[7],
        logit_bias_ids=np.zeros(0, np.int32),
        logit_bias_values=np.zeros(0, np.float32),
    )
    batch.lengths_R[3] = 2
    logits = torch.zeros(2, VOCAB)
    logits[1, 7] = 1.0
    out = torch.full((4, 8), -1, dtype=torch.int32)
    plan = sampler.plan(rows(3))
    assert plan.variant is Variant.GREEDY
    sampler.draw(logits, torch.tensor([-1, 3], dtype=torch.int32), batch, out, plan.variant)
    assert out[:3, :2].T.tolist() == [[0, 0, 0], [7, Finish.STOP_TOKEN, 0]]
    assert batch.history_RM[3, 2] == 7
    assert batch.lengths_R[3] == 3
    assert batch.finished_R[3]
