"""Triton's `sample_rows` against the sampler and the batch, run as `triton_cases.py` is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tercet.ops import triton_sampling
from tercet.ops.sample_rows import FINISH_ERROR, Variant
from tercet.ops.triton_sampling import Tiles
from tests.ops.sample_rows_harness import NUM_ROWS, Outcome, Rig, normal_logits, random_row
from tests.ops.sampling_reference import Row
from tests.ops.triton_harness import DEVICE, DTYPES, INTERPRETED, MARKS, seed

__all__ = ["seed"]  # a fixture
pytestmark = MARKS

# Small, so that a small vocabulary has several parts, groups and tiles.
SMALL = Tiles(scan=64, scan_warps=1, group=4, restrict=128, restrict_warps=2)
VOCAB = 211  # of no tile a multiple
LINES = 10


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch begins as NaN and as tokens that do not exist."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -123_456_789)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sampling, "TILES", SMALL)


def run(rig: Rig, logits: Tensor, **arguments: Any) -> Outcome:
    return rig.step(triton_sampling.sample_rows, logits.to(DEVICE), **arguments)


def rows_of(kind: str, rng: np.random.Generator, count: int, vocab_size: int = VOCAB) -> list[Row]:
    """Rows of a variant, or with every feature at once."""
    rows = [
        random_row(
            rng, vocab_size, edits=kind == "everything", restricted=kind in ("restricted", "everything")
        )
        for _ in range(count)
    ]
    if kind == "greedy":
        rows = [dataclasses.replace(row, temperature=0.0) for row in rows]
    return rows


# ---------------------------------------------------------------------------------- the whole outcome


@pytest.mark.usefixtures("_small_tiles")
def test_a_row_whose_scores_overflow_is_broken(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [Row([1], temperature=1e-5, top_k=top_k, stop=(7,)) for top_k in (0, 5)]
    got = run(Rig(rows, VOCAB), normal_logits(rng, 2, VOCAB) * 1e37)
    assert got.out_3S.tolist() == [[0, 0], [FINISH_ERROR] * 2, [1, 1]]


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["greedy", "temperature", "restricted", "everything"])
def test_draws_and_advances_as_the_sampler_does(kind: str, dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(rows_of(kind, rng, LINES), VOCAB, max_tokens=6, seed=seed)
    assert rig.state.variant(rig.places) == {"greedy": 0, "temperature": 1}.get(kind, 2)
    rig.freeze(2, 9)
    logits = normal_logits(rng, LINES, VOCAB)
    logits[3, 40], logits[5, 7], logits[6] = torch.nan, torch.inf, -torch.inf
    logits[9, 0] = torch.nan  # of a frozen row: not an error
    logits = logits.to(dtype)
    rig.assert_like(run(rig, logits), logits)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("step", [0.5] if INTERPRETED else [0.25, 0.5, 3.0])
def test_ties_go_to_the_lowest_id(step: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(rows_of("restricted", rng, LINES), VOCAB, seed=seed)
    logits = (normal_logits(rng, LINES, VOCAB) / step).round() * step
    rig.assert_like(run(rig, logits), logits)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    "row",
    [
        Row([1], top_p=0.02),
        Row([1], top_p=0.9),
        Row([1], top_k=2),
        Row([1], top_k=90),
        Row([1], top_k=90, top_p=0.9),
        Row([1], top_k=3, top_p=0.5),
        Row([1], min_p=0.5),
        Row([1], min_p=0.05, top_p=0.7),
        Row([1], min_p=0.05, top_p=0.7, top_k=40),
        Row([1], min_p=1.0),
    ],
    ids=str,
)
def test_restrictions(row: Row, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 3 if INTERPRETED else NUM_ROWS
    rows = [dataclasses.replace(row, seed=int(rng.integers(0, 2**63))) for _ in range(count)]
    rig = Rig(rows, VOCAB, seed=seed)
    logits = normal_logits(rng, count, VOCAB)
    logits *= torch.tensor([0.0, 0.1, 3.0] * (count // 3))[:, None]  # equal, flat, peaked
    rig.assert_like(run(rig, logits), logits)


@pytest.mark.usefixtures("_small_tiles")
def test_soft_cap_comes_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for kind in ("temperature", "everything"):
        rig = Rig(rows_of(kind, rng, 4), VOCAB, seed=seed)
        logits = normal_logits(rng, 4, VOCAB, scale=15.0)
        rig.assert_like(run(rig, logits, soft_cap=5.0), logits, soft_cap=5.0)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 65, 256])
def test_any_vocabulary(vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [
        Row([0], seed=i, temperature=0.8 * (i % 3 > 0), top_p=0.9 if i % 3 > 1 else 1.0) for i in range(6)
    ]
    rig = Rig(rows, vocab_size, seed=seed)
    logits = normal_logits(rng, 6, vocab_size)
    rig.assert_like(run(rig, logits), logits)


# ------------------------------------------------------------------------------- what must not matter


@pytest.mark.usefixtures("_small_tiles")
def test_a_line_does_not_depend_on_its_company(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(rows_of("everything", rng, 4), VOCAB, seed=seed)
    logits = normal_logits(rng, 4, VOCAB)
    whole = run(rig, logits)
    for lines in ([3], [-1, 2, -1, 0], [3, 2, 1]):
        part = run(rig, logits[[max(i, 0) for i in lines]].clone(), lines=lines)
        for at, i in enumerate(lines):
            wanted = whole.out_3S[:, i] if i >= 0 else torch.zeros(3, dtype=torch.int32)
            assert torch.equal(part.out_3S[:, at], wanted)


@pytest.mark.usefixtures("_small_tiles")
def test_a_row_draws_the_same_in_every_variant_that_serves_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = normal_logits(rng, 8, VOCAB)
    for kind, least in (("greedy", Variant.GREEDY), ("temperature", Variant.TEMPERATURE)):
        rig = Rig(rows_of(kind, rng, 8), VOCAB, seed=seed)
        outcomes = [run(rig, logits, variant=variant) for variant in Variant if variant >= least]
        assert all(torch.equal(outcome.out_3S, outcomes[0].out_3S) for outcome in outcomes)


@pytest.mark.usefixtures("_small_tiles")
def test_only_the_tokens_of_a_line_need_be_contiguous(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(rows_of("restricted", rng, 5), VOCAB, seed=seed)
    wide = normal_logits(rng, 5, VOCAB + 13).to(DEVICE)
    wide[:, VOCAB:] = torch.nan
    logits = wide[:, :VOCAB]
    whole = run(rig, logits.contiguous())
    seen = _run_view(rig, logits)
    assert torch.equal(seen, whole.out_3S)


def _run_view(rig: Rig, logits: Tensor) -> Tensor:
    """`Rig.step` compares bytes, which a view of this kind has no view of."""
    found: list[Tensor] = []

    def sample(contiguous: Tensor, *args: Any, **kwargs: Any) -> None:
        triton_sampling.sample_rows(logits, *args, **kwargs)
        found.append(args[3])

    rig.step(sample, logits.contiguous())
    return found[0][:3, : len(logits)].cpu()


# -------------------------------------------------------------------------------------- real sizes


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("vocab_size", [151936, 262145])
@pytest.mark.parametrize("scale", [0.5, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("kind", ["greedy", "temperature", "restricted", "everything"])
def test_real_sizes(kind: str, scale: float, vocab_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(rows_of(kind, rng, LINES, vocab_size), vocab_size, max_tokens=6, seed=seed)
    rig.freeze(2)
    logits = normal_logits(rng, LINES, vocab_size, scale)
    logits[3, 40_000] = torch.nan
    logits = logits.bfloat16()
    rig.assert_like(run(rig, logits), logits)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_captured_launch_draws_anew_at_each_replay(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(rows_of("everything", rng, LINES), VOCAB, seed=seed)
    found: list[list[int]] = []

    def sample(logits: Tensor, row_S: Tensor, tables: Any, history: Any, out: Tensor, **kwargs: Any) -> None:
        saved = [history.tokens_RM.clone(), history.lengths_R.clone(), history.finished_R.clone()]
        seen = tables.seen.clone()
        triton_sampling.sample_rows(logits, row_S, tables, history, out, **kwargs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            triton_sampling.sample_rows(logits, row_S, tables, history, out, **kwargs)
        for _ in range(3):
            for tensor, old in zip(
                (history.tokens_RM, history.lengths_R, history.finished_R), saved, strict=True
            ):
                tensor.copy_(old)
            tables.seen.copy_(seen)
            graph.replay()
            found.append(out[0, :LINES].tolist())

    logits = normal_logits(rng, LINES, VOCAB)
    rig.assert_like(rig.step(sample, logits.to(DEVICE)), logits)
    assert found[0] == found[1] == found[2]


# --------------------------------------------------------------------------------------- bad input


def test_what_the_kernels_cannot_read_is_refused() -> None:
    rng = np.random.default_rng(1)
    rig = Rig(rows_of("greedy", rng, 2), VOCAB)
    logits = normal_logits(rng, 2, VOCAB)

    def launch(change: str) -> None:
        def sample(
            values: Tensor, row_S: Tensor, tables: Any, history: Any, out: Tensor, **kwargs: Any
        ) -> None:
            if change == "logits_SV":
                values = torch.stack((values, values), dim=2)[:, :, 0]
            elif change == "row_S":
                row_S = row_S.long()
            else:
                out = out[:2]
            triton_sampling.sample_rows(values, row_S, tables, history, out, **kwargs)

        run_with = logits.to(DEVICE)
        rig.step(sample, run_with)

    for field in ("logits_SV", "row_S", "out_3S"):
        with pytest.raises(ValueError, match=field):
            launch(field)
