"""Triton kernels against float64 references: fresh random inputs, poisoned outputs.

Not collected by itself: `test_triton_kernels.py` runs it in a process of its own, in Triton's interpreter where
there is no GPU (TRITON_INTERPRET must be set before Triton is imported) and on the GPU where there is one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tercet.ops import AttentionMetadata, triton_attention, triton_rows
from tercet.ops.norm import rms_norm
from tests.ops.test_attention import expected_row

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# In the interpreter tl.dot of bfloat16 returns rubbish.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
# What numpy says of the interpreter's scalars, and of overflow that the kernels mean.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Fresh for every run and shown when a test fails."""
    value = random.SystemRandom().randrange(1 << 31)
    request.node.add_report_section("call", "seed", str(value))
    torch.manual_seed(value)
    return value


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Every element within rounding, relative to the size of the whole."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double().cpu(), expected.double().cpu(), atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------------------- attention


class Batch:
    """Sequences of random keys and values in shuffled blocks, beside large numbers that belong to nobody."""

    def __init__(
        self,
        decode_lens: list[int],
        chunks: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        spare_len: int = 0,
    ) -> None:
        num_heads, num_kv_heads = heads
        self.query_lens = [1] * len(decode_lens) + [query for query, _ in chunks]
        self.seq_lens = decode_lens + [length for _, length in chunks]
        counts = [-(-length // block_size) for length in self.seq_lens]
        order = (torch.randperm(sum(counts)) + 1).tolist()
        shape = (2, sum(counts) + 1, block_size, num_kv_heads, head_dim)
        self.kv_cache = torch.full(shape, 1e4, dtype=dtype, device=DEVICE)
        self.q_THD = randn(sum(self.query_lens), num_heads, head_dim, dtype=dtype)
        width = max(counts) + 2 + spare_len // block_size
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        tables, starts = [], [0]
        for query_len, length, count in zip(self.query_lens, self.seq_lens, counts, strict=True):
            blocks, order = order[:count], order[count:]
            own = torch.tensor([blocks[i // block_size] * block_size + i % block_size for i in range(length)])
            kv = randn(2, length, num_kv_heads, head_dim, dtype=dtype)
            self.kv_cache.flatten(1, 2)[:, own.to(DEVICE)] = kv
            self.keys_values.append((kv[0], kv[1]))
            tables.append(blocks + [0] * (width - count))
            starts.append(starts[-1] + query_len)

        def column(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        self.meta = AttentionMetadata(
            num_decodes=len(decode_lens),
            block_table_BN=column(tables),
            seq_lens_B=column(self.seq_lens),
            query_start_B1=column(starts),
            slot_mapping_T=torch.zeros(0, dtype=torch.int64, device=DEVICE),
            max_query_len=max(self.query_lens),
            max_seq_len=max(self.seq_lens) + spare_len,
            chunk_query_lens=tuple(query for query, _ in chunks),
            chunk_seq_lens=tuple(length for _, length in chunks),
        )

    def run(self, **arguments: Any) -> Tensor:
        return triton_attention.paged_attention(self.q_THD, self.kv_cache, self.meta, **arguments)

    def expected(
        self, scale: float, sliding_window: int | None = None, soft_cap: float | None = None
    ) -> Tensor:
        rows, token = [], 0
        for (k, v), query_len, length in zip(self.keys_values, self.query_lens, self.seq_lens, strict=True):
            for i in range(query_len):
                end = length - query_len + i + 1
                first = 0 if sliding_window is None else max(0, end - sliding_window)
                rows.append(expected_row(self.q_THD[token], k[first:end], v[first:end], scale, soft_cap))
                token += 1
        return torch.stack(rows)


BATCHES: dict[str, dict[str, Any]] = {
    "decodes": {"decode_lens": [1, 130, 64, 65], "chunks": [], "heads": (2, 1)},
    "one decode": {"decode_lens": [117], "chunks": []},
    "prefills": {"decode_lens": [], "chunks": [(75, 75), (1, 1), (40, 40)]},
    "chunks": {"decode_lens": [], "chunks": [(5, 70), (33, 100), (1, 9), (3, 3)]},
    "mixed": {"decode_lens": [3, 100], "chunks": [(7, 7), (50, 83)]},
    "generous bound": {"decode_lens": [3, 21], "chunks": [(6, 19)], "spare_len": 200},
    "one kv head": {"decode_lens": [6, 70], "chunks": [(40, 72)], "heads": (4, 1)},
    "no groups": {"decode_lens": [6, 70], "chunks": [(40, 72)], "heads": (2, 2)},
    "groups of 3": {"decode_lens": [6, 70], "chunks": [(40, 72)], "heads": (6, 2)},
    "groups of 20": {"decode_lens": [6, 40], "chunks": [(3, 40)], "heads": (20, 1)},
    "odd head size": {"decode_lens": [6, 70], "chunks": [(9, 40)], "head_dim": 20},
    "small heads and blocks": {"decode_lens": [6, 70], "chunks": [(9, 40)], "head_dim": 8, "block_size": 4},
    "large heads and blocks": {
        "decode_lens": [6, 70],
        "chunks": [(9, 40)],
        "head_dim": 128,
        "block_size": 32,
    },
    "very large heads": {"decode_lens": [6, 70], "chunks": [(9, 40)], "head_dim": 256},
    "blocks of 12": {"decode_lens": [6, 70], "chunks": [(9, 40)], "block_size": 12},
}
LARGE: dict[str, dict[str, Any]] = {
    "long": {"decode_lens": [3000, 1, 517, 2048], "chunks": [(300, 1500), (513, 513)], "heads": (16, 8)},
    "long decode": {"decode_lens": [4096], "chunks": [], "heads": (8, 2)},
    "many": {"decode_lens": list(range(1, 200)), "chunks": [], "heads": (8, 8)},
    "many chunks": {"decode_lens": [5], "chunks": [(i, 2 * i + 1) for i in range(1, 60)], "heads": (28, 4)},
    "long prefill": {"decode_lens": [], "chunks": [(1024, 1024), (700, 2048)], "heads": (32, 8)},
}
SEEN = [(None, None), (1, None), (20, None), (64, 2.0), (None, 2.0)]


HALF_IN_INTERPRETER = ("mixed", "large heads and blocks")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in BATCHES
        for dtype in DTYPES
        if not INTERPRETED or dtype == torch.float32 or name in HALF_IN_INTERPRETER
    ],
)
def test_attention(name: str, dtype: torch.dtype, seed: int) -> None:
    window, cap = random.Random(seed).choice(SEEN)  # each is compiled anew: one for each batch and run
    batch = Batch(**BATCHES[name], dtype=dtype)
    got = batch.run(scale=0.2, sliding_window=window, soft_cap=cap)
    assert got.dtype == dtype
    assert_close(got, batch.expected(0.2, window, cap), dtype)


@pytest.mark.parametrize(("window", "cap"), SEEN)
def test_windows_and_caps(window: int | None, cap: float | None, seed: int) -> None:
    batch = Batch([3, 100], [(7, 7), (50, 83)])
    got = batch.run(scale=0.2, sliding_window=window, soft_cap=cap)
    assert_close(got, batch.expected(0.2, window, cap), torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("name", LARGE)
def test_attention_of_real_sizes(name: str, window: int | None, dtype: torch.dtype, seed: int) -> None:
    batch = Batch(**LARGE[name], head_dim=128, dtype=dtype)
    got = batch.run(scale=0.088, sliding_window=window)
    assert_close(got, batch.expected(0.088, window), dtype)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("garbage", [0, -7, 1 << 30])
def test_rows_without_a_length_harm_nobody(garbage: int, window: int | None, seed: int) -> None:
    batch = Batch([9, 40, 33], [])
    expected = batch.expected(0.3, window)
    batch.meta.seq_lens_B[1] = garbage
    got = batch.run(scale=0.3, sliding_window=window)
    assert got.isfinite().all()
    assert_close(got[[0, 2]], expected[[0, 2]], torch.float32)


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_any_number_of_splits(splits: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "num_splits", lambda *_: splits)
    batch = Batch([150, 32, 1, 97], [], heads=(2, 1))
    for window in (None, 40):
        got = batch.run(scale=0.3, sliding_window=window)
        assert_close(got, batch.expected(0.3, window), torch.float32)


def test_queries_may_be_a_view(seed: int) -> None:
    batch = Batch([9, 40], [(3, 30)])
    expected = batch.expected(0.3)
    wide = randn(5, 10, 16)
    wide[:, 2:6] = batch.q_THD
    batch.q_THD = wide[:, 2:6]
    assert_close(batch.run(scale=0.3), expected, torch.float32)


def test_splits_follow_from_what_the_host_knows() -> None:
    assert triton_attention.num_splits(2048, 8192, 64, 132) == 1
    assert triton_attention.num_splits(8, 384, 64, 132) == 6
    assert triton_attention.num_splits(8, 8192, 64, 132) == 66
    assert triton_attention.num_splits(1, 100_000, 64, 132) == 128


# --------------------------------------------------------------------------------------- rows


def normed(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (offset + weight.double())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [7, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype, size: int, offset: float, seed: int) -> None:
    x, residual, weight = (
        randn(3, 2, size, dtype=dtype),
        randn(3, 2, size, dtype=dtype),
        randn(size, dtype=dtype),
    )
    assert_close(triton_rows.rms_norm(x, weight, 1e-3, offset), normed(x, weight, offset), dtype)
    got, total = triton_rows.add_rms_norm(x, residual, weight, 1e-3, offset)
    assert torch.equal(total, x + residual)
    assert_close(got, normed(x + residual, weight, offset), dtype)


def test_norm_of_a_view(seed: int) -> None:
    x, weight = randn(4, 6, 32)[:, 1:3], randn(32)
    assert_close(triton_rows.rms_norm(x, weight, 1e-3), normed(x, weight, 0.0), torch.float32)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (triton_rows.silu_and_mul, torch.nn.functional.silu),
        (triton_rows.gelu_tanh_and_mul, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
@pytest.mark.parametrize("size", [6, 1024, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activations(
    activation: Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    size: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    both = randn(3, 2 * size, dtype=dtype) * 3
    gate, up = both.double().chunk(2, dim=-1)
    assert_close(activation(both), function(gate) * up, dtype)


@pytest.mark.parametrize("norm", [None, 0.0, 1.0])
@pytest.mark.parametrize("heads", [(9, 3), (5, 1)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(20, 10), (128, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_and_write_kv(
    dtype: torch.dtype, head_dim: int, rotary_dim: int, heads: tuple[int, int], norm: float | None, seed: int
) -> None:
    num_heads, num_kv_heads = heads
    tokens, block_size = 5, 4
    qkv = randn(tokens, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    weights = (randn(head_dim, dtype=dtype), randn(head_dim, dtype=dtype))
    angles = torch.randn(tokens, rotary_dim // 2, dtype=torch.float64)
    both = torch.cat((angles, angles), -1)
    cos, sin = both.cos().to(DEVICE, dtype), both.sin().to(DEVICE, dtype)
    slots = torch.randperm(6 * block_size)[:tokens].to(DEVICE)
    cache = torch.zeros(2, 6, block_size, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)
    q = triton_rows.rope_and_write_kv(
        qkv,
        cos,
        sin,
        cache,
        slots,
        qk_norm=None if norm is None else weights,
        eps=1e-3,
        weight_offset=norm or 0,
    )
    exact_q, exact_k, exact_v = qkv.double().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norm is not None:
        exact_q, exact_k = normed(exact_q, weights[0], norm), normed(exact_k, weights[1], norm)
    exact_q, exact_k = (rotated(x, cos.double(), sin.double()) for x in (exact_q, exact_k))
    assert_close(q, exact_q, dtype)
    flat = cache.flatten(1, 2)
    assert_close(flat[0, slots], exact_k, dtype)
    assert torch.equal(flat[1, slots], exact_v.to(dtype))
    flat[:, slots] = 0
    assert not flat.any()  # nothing else was written


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None, :half], sin[:, None, :half]
    return torch.cat((first * c - second * s, second * c + first * s, rest), -1)


def test_cache_stays_finite(seed: int) -> None:
    cache = torch.zeros(2, 2, 4, 1, 4, dtype=torch.float16, device=DEVICE)
    bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")], device=DEVICE, dtype=torch.float16)
    one = torch.ones(1, 4, device=DEVICE, dtype=torch.float16)
    slots = torch.tensor([5], device=DEVICE)
    triton_rows.rope_and_write_kv(bad.expand(1, 3, 4), one, one * 0, cache, slots)
    assert cache[1, 1, 1, 0].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert cache.isfinite().all()


def test_heads_that_do_not_fit_the_cache_are_refused() -> None:
    cache, one = torch.zeros(2, 2, 4, 1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    for shape in ((1, 2, 4), (1, 3, 8)):
        with pytest.raises(ValueError, match=r"do not fit the cache \(2, 2, 4, 1, 4\)"):
            triton_rows.rope_and_write_kv(
                torch.ones(shape, device=DEVICE), one, one, cache, torch.tensor([1], device=DEVICE)
            )


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_large_norm_is_that_of_the_reference(seed: int) -> None:
    x, weight = randn(513, 4096, dtype=torch.bfloat16), randn(4096, dtype=torch.bfloat16)
    expected = rms_norm.select(torch.device("cpu"), x.dtype)(x.cpu(), weight.cpu(), 1e-6)
    assert_close(triton_rows.rms_norm(x, weight, 1e-6), expected, torch.bfloat16)
