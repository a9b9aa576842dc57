"""Noise, argmax and draws against the definition: exact tokens by row, and distributions by chi-square."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tercet.ops import sampling
from tercet.ops.noise import log_exponential, noise_keys, split_seed
from tercet.ops.sampling import RowParams, argmax, gumbel_argmax, sample_restricted
from tests.ops import sampling_reference as reference
from tests.ops.sampling_reference import Row, chi_square_z

SEEDS = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 0x9E3779B97F4A7C15, 2**64 - 1]
MAX_Z = 4.0  # of a fixed draw: it fails by chance once in 30,000 changes of the noise


@pytest.fixture(params=["best", "reference"])
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "reference":
        monkeypatch.setenv("TERCET_OPS", "reference")
    operations = (argmax, gumbel_argmax, sample_restricted)
    for operation in operations:
        operation.forget_choices()
    yield
    monkeypatch.undo()
    for operation in operations:
        operation.forget_choices()


def seed_words(seeds: list[int]) -> torch.Tensor:
    return torch.tensor([split_seed(seed) for seed in seeds], dtype=torch.int32).T.unsqueeze(-1).contiguous()


def row_params(rows: list[Row]) -> RowParams:
    def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).unsqueeze(1)

    greedy = [row.temperature == 0 for row in rows]
    top_k = [1 if g else row.top_k or sampling.UNBOUNDED for g, row in zip(greedy, rows, strict=True)]
    return RowParams(
        inv_temperature_B1=column([1 / (row.temperature or 1) for row in rows]),
        is_random_B1=column([float(not g) for g in greedy]) if any(greedy) else None,
        top_k_B1=column(top_k, torch.int32),
        top_p_B1=column([row.top_p for row in rows]),
        min_p_B1=column([row.min_p for row in rows]),
    )


def keys_of(rows: list[Row]) -> torch.Tensor:
    positions = torch.tensor([len(row.outputs) for row in rows], dtype=torch.int32)
    return noise_keys(seed_words([row.seed for row in rows]), positions)


def many(row: Row, count: int) -> list[Row]:
    """The same row at 8 positions of each of count / 8 seeds."""
    return [
        Row(**{**vars(row), "seed": seed, "outputs": [0] * position})
        for seed in range(count // 8)
        for position in range(8)
    ]


# --------------------------------------------------------------------------------------------------
# Noise


def test_noise_is_the_documented_function_of_seed_position_kind_and_token() -> None:
    for kind in (0, 3):
        for position in (0, 1, 77, 131_071):
            keys = noise_keys(seed_words(SEEDS), torch.full((len(SEEDS),), position).int(), kind)
            tokens = torch.tensor([0, 1, 31, 49_151, 262_143], dtype=torch.int32)
            found = log_exponential(tokens, keys)
            for i, seed in enumerate(SEEDS):
                key = reference.keys(seed, position, kind)
                wanted = [reference.log_noise(token, key) for token in tokens.tolist()]
                for got, want in zip(found[i].tolist(), wanted, strict=True):
                    # float32 holds 1 - v = exp(-noise) to about 2^-24
                    assert got == pytest.approx(want, abs=2e-6 + 1e-7 * math.exp(math.exp(want)))


def test_noise_of_given_tokens_equals_noise_of_the_whole_vocabulary() -> None:
    keys = noise_keys(seed_words(SEEDS), torch.arange(len(SEEDS)).int())
    whole = log_exponential(torch.arange(5000, dtype=torch.int32), keys)
    tokens = torch.randint(0, 5000, (len(SEEDS), 300), generator=torch.Generator().manual_seed(1)).int()
    assert torch.equal(log_exponential(tokens, keys), whole.gather(1, tokens.long()))


def test_noise_stays_finite_at_both_ends() -> None:
    ends = torch.tensor([[0, 0x7FFFFFFF]], dtype=torch.int32)
    unit = ends.float().add(0.5).mul(-(1.0 - 2.0**-24) * 2.0**-31)
    assert torch.isfinite(unit.log1p().neg().log()).all()


def test_noise_is_uniform_over_tokens_positions_and_seeds() -> None:
    keys = noise_keys(seed_words(list(range(1024))), torch.arange(1024).int())
    uniform = torch.exp(-log_exponential(torch.arange(1024, dtype=torch.int32), keys).exp()).double()
    for sample in (uniform.flatten(), uniform[:, 7], uniform[5]):
        counts = np.histogram(sample, bins=32, range=(0, 1))[0].astype(float)
        assert abs(chi_square_z(counts, np.full(32, counts.sum() / 32))) < MAX_Z


@pytest.mark.parametrize("axis", ["token", "position", "seed", "high word"])
def test_noise_at_neighbours_is_independent(axis: str) -> None:
    count = 20_000
    tokens = torch.tensor([5], dtype=torch.int32)
    fixed = torch.zeros(count, dtype=torch.int32)
    steps = torch.arange(count, dtype=torch.int32)
    if axis == "token":
        flat = log_exponential(steps, noise_keys(seed_words([3]), fixed[:1])).flatten()
    elif axis == "position":
        flat = log_exponential(tokens, noise_keys(seed_words([3]).expand(2, count, 1), steps)).flatten()
    else:
        shift = 32 if axis == "high word" else 0
        seeds = seed_words([i << shift for i in range(count)])
        flat = log_exponential(tokens, noise_keys(seeds, fixed)).flatten()
    uniform = torch.exp(-flat.exp()).double()
    pairs = np.histogram2d(uniform[0::2], uniform[1::2], bins=8, range=((0, 1), (0, 1)))[0]
    assert abs(chi_square_z(pairs, np.full(64, count / 2 / 64))) < MAX_Z


def test_a_seed_of_more_than_64_bits_is_refused() -> None:
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="64-bit"):
            split_seed(seed)


# --------------------------------------------------------------------------------------------------
# Exact draws


@pytest.mark.usefixtures("_implementation")
@pytest.mark.parametrize("vocab_size", [1, 7, 63, 64, 65, 1000])
def test_argmax_takes_the_first_of_equals_and_shows_broken_rows(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randint(0, 6, (50, vocab_size), generator=generator).float()
    logits[3] = -torch.inf
    logits[4, vocab_size // 2] = torch.nan
    logits[5, -1] = torch.inf
    token, value = argmax(logits)
    normal = [i for i in range(50) if i not in (3, 4, 5)]
    assert token[normal].tolist() == [int(np.argmax(logits[i].numpy())) for i in normal]
    assert torch.equal(value[normal], logits[normal].amax(-1))
    assert value[3] == -torch.inf
    assert value[4].isnan()
    assert value[5] == torch.inf
    assert int(token.min()) >= 0
    assert int(token.max()) < vocab_size


def mixed_rows(count: int, vocab_size: int, rng: np.random.Generator) -> list[Row]:
    def some(value: float, otherwise: float) -> float:
        return value if rng.random() < 0.5 else otherwise

    return [
        Row(
            prompt=[1],
            outputs=[0] * int(rng.integers(0, 50)),
            seed=int(rng.integers(0, 2**63)),
            temperature=float(rng.choice([0, 0.3, 0.7, 1.0, 1.9])),
            top_k=int(some(int(rng.integers(1, vocab_size + 3)), 0)),
            top_p=some(float(rng.uniform(0.05, 0.999)), 1.0),
            min_p=some(float(rng.uniform(0, 0.3)), 0.0),
        )
        for _ in range(count)
    ]


@pytest.mark.usefixtures("_implementation")
@pytest.mark.parametrize("vocab_size", [5, 129, 900, 3000])
@pytest.mark.parametrize("step", [0.0, 0.25], ids=["distinct", "tied"])
def test_mixed_rows_draw_what_the_definition_says(vocab_size: int, step: float) -> None:
    rng = np.random.default_rng(vocab_size)
    for scale in (0.5, 4.0):  # flat rows need more than any candidate set, peaked ones a few tokens
        rows = mixed_rows(24, vocab_size, rng)
        logits = torch.from_numpy(rng.normal(0, scale, (24, vocab_size)).astype(np.float32))
        if step:
            logits = (logits / step).round() * step
        token, _ = sample_restricted(logits, row_params(rows), keys_of(rows))
        assert token.tolist() == [
            reference.draw(line.numpy(), row) for line, row in zip(logits, rows, strict=True)
        ]


@pytest.mark.usefixtures("_implementation")
def test_a_row_draws_the_same_through_every_variant_and_in_any_company() -> None:
    rng = np.random.default_rng(5)
    rows = [Row(prompt=[1], seed=seed, temperature=0.9) for seed in range(40)]
    logits = torch.from_numpy(rng.normal(0, 3, (40, 3000)).astype(np.float32))
    plain, _ = gumbel_argmax(logits, row_params(rows), keys_of(rows))
    full, _ = sample_restricted(logits, row_params(rows), keys_of(rows))
    assert torch.equal(plain, full)
    company = rows[:20] + [Row(prompt=[1], seed=seed, temperature=0.9, top_p=0.8) for seed in range(20)]
    beside, _ = sample_restricted(logits, row_params(company), keys_of(company))
    assert torch.equal(plain[:20], beside[:20])
    for i in (0, 7, 25):
        alone, _ = sample_restricted(logits[i : i + 1], row_params([company[i]]), keys_of([company[i]]))
        assert alone[0] == beside[i]


@pytest.mark.usefixtures("_implementation")
def test_broken_rows_are_told_and_leave_the_others_alone() -> None:
    rng = np.random.default_rng(6)
    rows = [Row(prompt=[1], seed=seed, top_k=20, top_p=0.9) for seed in range(12)]
    logits = torch.from_numpy(rng.normal(0, 3, (12, 500)).astype(np.float32))
    for draw in (gumbel_argmax, sample_restricted):
        clean, _ = draw(logits, row_params(rows), keys_of(rows))
        broken = logits.clone()
        broken[2] = torch.nan
        broken[5, 100] = torch.nan
        broken[7] = -torch.inf
        broken[9, 3] = torch.inf
        token, value = draw(broken, row_params(rows), keys_of(rows))
        assert torch.isfinite(value).logical_not().nonzero().flatten().tolist() == [2, 5, 7, 9]
        others = [i for i in range(12) if i not in (2, 5, 7, 9)]
        assert torch.equal(token[others], clean[others])
        assert int(token.max()) < 500


# --------------------------------------------------------------------------------------------------
# Distributions


@pytest.mark.parametrize(
    "row",
    [
        Row(prompt=[1]),
        Row(prompt=[1], temperature=0.7, top_p=0.8),
        Row(prompt=[1], temperature=1.3, top_k=7),
        Row(prompt=[1], min_p=0.08),
        Row(prompt=[1], temperature=1.5, top_k=12, top_p=0.9, min_p=0.02),
    ],
    ids=["T=1", "T=0.7 top_p", "top_k", "min_p", "all"],
)
def test_draws_have_the_distribution_of_the_definition(row: Row) -> None:
    count, vocab_size = 32_000, 60
    logits = np.random.default_rng(3).normal(0, 1, vocab_size).astype(np.float32)
    rows = many(row, count)
    draw = sample_restricted if row.top_k or row.top_p < 1 or row.min_p else gumbel_argmax
    token, _ = draw(torch.from_numpy(logits).expand(count, -1).contiguous(), row_params(rows), keys_of(rows))
    observed = np.bincount(token.numpy(), minlength=vocab_size).astype(float)
    assert abs(chi_square_z(observed, count * reference.distribution(logits, row))) < MAX_Z


def test_a_large_vocabulary_of_unlikely_tokens_is_drawn_in_proportion() -> None:
    """Half the weight lies on one token, half on 20,000 others: coarse noise would favour one side."""
    count, vocab_size = 4_000, 20_001
    logits = torch.zeros(1, vocab_size)
    logits[0, 17] = np.log(vocab_size - 1)
    rows = many(Row(prompt=[1]), count)
    tokens = torch.cat(
        [
            gumbel_argmax(logits.expand(500, -1).contiguous(), row_params(part), keys_of(part))[0]
            for part in (rows[start : start + 500] for start in range(0, count, 500))
        ]
    ).numpy()
    thirds = np.bincount(np.minimum(tokens[tokens != 17] // 6667, 2), minlength=3)
    observed = np.array([(tokens == 17).sum(), *thirds], dtype=float)
    sizes = np.array([20_000, 6666, 6667, 6667], dtype=float)
    assert abs(chi_square_z(observed, count * sizes / 40_000)) < MAX_Z


@pytest.mark.parametrize("axis", ["rows", "positions"])
def test_draws_of_neighbours_are_independent(axis: str) -> None:
    """Pairs of rows with seeds i, i + 1, and of positions i, i + 1 of one seed."""
    count, vocab_size = 20_000, 8
    logits = torch.linspace(0, 1.5, vocab_size).expand(count, -1).contiguous()
    if axis == "rows":
        seeds, positions = seed_words(list(range(count))), torch.full((count,), 3).int()
    else:
        seeds, positions = seed_words([42]).expand(2, count, 1), torch.arange(count).int()
    token, _ = gumbel_argmax(logits, row_params([Row(prompt=[1])] * count), noise_keys(seeds, positions))
    first, second = token[0::2].numpy(), token[1::2].numpy()
    observed = np.bincount(first * vocab_size + second, minlength=vocab_size**2).astype(float)
    p = torch.softmax(logits[0].double(), 0).numpy()
    assert abs(chi_square_z(observed, count / 2 * np.outer(p, p))) < MAX_Z
