"""Paged attention against attention computed sequence by sequence from its definition."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from tercet import ops
from tercet.ops import AttentionMetadata, attention

BLOCK_SIZE = 4
HEAD_DIM = 8


def expected_row(q_HD: Tensor, k_LKD: Tensor, v_LKD: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """One query over the positions that it sees, in float64."""
    group = q_HD.shape[0] // k_LKD.shape[1]
    k_LHD, v_LHD = (x.double().repeat_interleave(group, 1) for x in (k_LKD, v_LKD))
    scores_HL = torch.einsum("hd,lhd->hl", q_HD.double(), k_LHD) * scale
    if soft_cap is not None:
        scores_HL = soft_cap * torch.tanh(scores_HL / soft_cap)
    return torch.einsum("hl,lhd->hd", scores_HL.softmax(-1), v_LHD)


class Batch:
    """Sequences of random keys and values in shuffled blocks; the last tokens of each are this step's."""

    def __init__(
        self,
        decode_lens: list[int],
        chunks: list[tuple[int, int]],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        dtype: torch.dtype = torch.float32,
        spare_len: int = 0,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.query_lens = [1] * len(decode_lens) + [query for query, _ in chunks]
        self.seq_lens = decode_lens + [length for _, length in chunks]
        width = max(-(-length // BLOCK_SIZE) for length in self.seq_lens) + 2
        free = list(range(1, 2 + sum(-(-length // BLOCK_SIZE) for length in self.seq_lens)))
        random.Random(0).shuffle(free)
        shape = (2, len(free) + 1, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
        # Slots that belong to nobody hold large numbers, which would show.
        self.kv_cache = torch.full(shape, 1e4, dtype=dtype, device=device)
        self.q_THD = torch.randn(sum(self.query_lens), num_heads, HEAD_DIM, generator=generator).to(
            device, dtype
        )
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        tables, starts, slots = [], [0], []
        for query_len, length in zip(self.query_lens, self.seq_lens, strict=True):
            blocks = [free.pop() for _ in range(-(-length // BLOCK_SIZE))]
            own = [blocks[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(length)]
            kv = torch.randn(2, length, num_kv_heads, HEAD_DIM, generator=generator).to(device, dtype)
            if length:
                ops.write_kv(kv[0], kv[1], self.kv_cache, torch.tensor(own, device=device))
            self.keys_values.append((kv[0], kv[1]))
            tables.append(blocks + [0] * (width - len(blocks)))
            starts.append(starts[-1] + query_len)
            slots += own[length - query_len :] or [0]
        self.meta = AttentionMetadata(
            num_decodes=len(decode_lens),
            block_table_BN=torch.tensor(tables, dtype=torch.int32, device=device),
            seq_lens_B=torch.tensor(self.seq_lens, dtype=torch.int32, device=device),
            query_start_B1=torch.tensor(starts, dtype=torch.int32, device=device),
            slot_mapping_T=torch.tensor(slots, device=device),
            max_query_len=max(self.query_lens),
            max_seq_len=max(self.seq_lens) + spare_len,
            chunk_query_lens=tuple(query for query, _ in chunks),
            chunk_seq_lens=tuple(length for _, length in chunks),
        )

    def run(self, **arguments: Any) -> Tensor:
        return ops.paged_attention(self.q_THD, self.kv_cache, self.meta, **arguments)

    def expected(self, scale: float, *masks: Any, **named: Any) -> Tensor:
        return expected_output(self, scale, *masks, **named)


def expected_output(
    batch: Any, scale: float, sliding_window: int | None = None, soft_cap: float | None = None
) -> Tensor:
    """Every token of a batch by itself: [T, H, D]."""
    rows, token = [], 0
    for (k, v), query_len, length in zip(batch.keys_values, batch.query_lens, batch.seq_lens, strict=True):
        for i in range(query_len):
            end = length - query_len + i + 1
            first = 0 if sliding_window is None else max(0, end - sliding_window)
            rows.append(expected_row(batch.q_THD[token], k[first:end], v[first:end], scale, soft_cap))
            token += 1
    return torch.stack(rows)


BATCHES: dict[str, dict[str, Any]] = {
    "decodes": {"decode_lens": [1, 17, 4, 9], "chunks": []},
    "one decode": {"decode_lens": [23], "chunks": []},
    "prefills": {"decode_lens": [], "chunks": [(11, 11), (1, 1), (4, 4)]},
    "chunks": {"decode_lens": [], "chunks": [(5, 12), (1, 9), (3, 30)]},
    "mixed": {"decode_lens": [3, 21], "chunks": [(7, 7), (6, 19)]},
    "generous bound": {"decode_lens": [3, 21], "chunks": [(6, 19)], "spare_len": 100},
    "one kv head": {"decode_lens": [6, 13], "chunks": [(6, 19)], "num_kv_heads": 1},
    "no groups": {"decode_lens": [6, 13], "chunks": [(6, 19)], "num_kv_heads": 4},
}


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("sliding_window", [None, 1, 4, 6, 64])
@pytest.mark.parametrize("name", BATCHES)
def test_output_is_attention_over_each_sequence(
    name: str, sliding_window: int | None, soft_cap: float | None
) -> None:
    batch = Batch(**BATCHES[name])
    got = batch.run(scale=0.3, sliding_window=sliding_window, soft_cap=soft_cap)
    expected = batch.expected(0.3, sliding_window, soft_cap)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_rounding(dtype: torch.dtype) -> None:
    batch = Batch(**BATCHES["mixed"], dtype=dtype)
    got = batch.run(scale=0.3)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), batch.expected(0.3), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("garbage", [0, -7, 1 << 30])
def test_rows_without_a_length_harm_nobody(garbage: int, sliding_window: int | None) -> None:
    batch = Batch([9, 14, 3], [])
    expected = batch.expected(0.3, sliding_window)
    batch.meta.seq_lens_B[1] = garbage
    got = batch.run(scale=0.3, sliding_window=sliding_window)
    assert got.isfinite().all()
    torch.testing.assert_close(got[[0, 2]].double(), expected[[0, 2]], atol=1e-5, rtol=1e-5)


def test_large_batches_are_gathered_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(list(range(1, 40)), [])
    monkeypatch.setattr(attention, "GATHER_BYTES_MAX", 40_000)
    torch.testing.assert_close(batch.run(scale=0.3).double(), batch.expected(0.3), atol=1e-5, rtol=1e-5)


def count_calls(batch: Batch, sliding_window: int | None) -> int:
    calls = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        batch.run(scale=0.3, sliding_window=sliding_window)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("sliding_window", [None, 5])
def test_decode_makes_as_many_python_calls_for_any_batch(sliding_window: int | None) -> None:
    small, large = Batch([9] * 8, []), Batch([9] * 256, [])
    count_calls(small, sliding_window)  # first calls choose implementations
    small, large = Batch([9] * 8, []), Batch([9] * 256, [])
    large.run(scale=0.3, sliding_window=sliding_window)  # grows the buffer
    large.meta.memo.clear()
    assert count_calls(small, sliding_window) == count_calls(large, sliding_window)


def test_layers_of_a_step_share_their_masks() -> None:
    batch = Batch(**BATCHES["mixed"])
    first = batch.run(scale=0.3)
    memo = dict(batch.meta.memo)
    second = batch.run(scale=0.3)
    assert torch.equal(first, second)
    assert memo.keys() == batch.meta.memo.keys()
    assert all(batch.meta.memo[key] is memo[key] for key in memo)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_cuda_gives_the_same(name: str, sliding_window: int | None) -> None:
    batch = Batch(**BATCHES[name], device="cuda")
    got = batch.run(scale=0.3, sliding_window=sliding_window)
    expected = batch.expected(0.3, sliding_window)
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    batch = Batch(**BATCHES["mixed"], device="cuda")
    batch.run(scale=0.3, sliding_window=5)
    batch.meta.memo.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.run(scale=0.3, sliding_window=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["decodes", "prefills", "mixed"])
def test_counts_on_the_device_stand_for_numbers_on_the_host(name: str) -> None:
    batch = Batch(**BATCHES[name])
    expected, meta = batch.run(scale=0.3, sliding_window=6), batch.meta
    rows, spare = len(batch.seq_lens), 3

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.cat((values, torch.full((spare, *values.shape[1:]), 1 << 30, dtype=values.dtype)))

    batch.q_THD = torch.cat((batch.q_THD, torch.full((spare, 4, HEAD_DIM), float("nan"))))
    batch.meta = dataclasses.replace(
        meta,
        num_decodes=meta.num_decodes + 2,
        block_table_BN=padded(meta.block_table_BN),
        seq_lens_B=padded(meta.seq_lens_B),
        query_start_B1=padded(meta.query_start_B1),
        chunk_query_lens=(),
        chunk_seq_lens=(),
        counts=torch.tensor([meta.num_decodes, rows - meta.num_decodes], dtype=torch.int32),
        num_chunks=rows - meta.num_decodes + 1,
        num_chunk_tokens=expected.shape[0],
        memo={},
    )
    got = batch.run(scale=0.3, sliding_window=6)
    assert torch.equal(got[: expected.shape[0]], expected)


def test_bounds_are_the_numbers_where_there_are_no_counts() -> None:
    meta = Batch(**BATCHES["mixed"]).meta
    assert (meta.chunks_bound, meta.chunk_tokens_bound) == (2, 13)
    counts = torch.tensor([2, 2], dtype=torch.int32)
    bounded = dataclasses.replace(meta, counts=counts, num_chunks=8, num_chunk_tokens=64)
    assert (bounded.chunks_bound, bounded.chunk_tokens_bound) == (8, 64)
    exact = bounded.exact()
    assert exact.num_decodes == 2 and exact.counts is None
    assert (exact.chunk_query_lens, exact.chunk_seq_lens) == ((7, 6), (7, 19))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_cache(dtype: torch.dtype) -> None:
    batch = Batch(**BATCHES["mixed"], dtype=dtype)
    exact, scales = batch.expected(0.3), {"k_scale": 0.25, "v_scale": 0.125}
    shape = batch.kv_cache.shape
    cache = torch.zeros(shape).to(torch.float8_e4m3fn)
    flat = batch.kv_cache.flatten(1, 2).clamp(-50, 50)  # the slots of nobody, too
    ops.write_kv(flat[0], flat[1], cache, torch.arange(flat.shape[1]), **scales)
    batch.kv_cache = cache
    got = batch.run(scale=0.3, **scales)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, atol=0.15, rtol=0.15)  # 3 bits of mantissa
    # Against what the cache holds, it is as exact as any.
    held = cache.float() * torch.tensor([0.25, 0.125])[:, None, None, None, None]
    batch.kv_cache = held.to(dtype)
    torch.testing.assert_close(got, batch.run(scale=0.3), atol=2e-2, rtol=2e-2)


def test_float8_cache_saturates_and_stays_finite() -> None:
    cache = torch.zeros(2, 2, 4, 1, 4).to(torch.float8_e4m3fn)
    values = torch.tensor([[[1e4, -1e4, float("nan"), 1.0]]])
    ops.write_kv(values, values, cache, torch.tensor([5]), k_scale=2.0, v_scale=0.5)
    assert cache[0, 1, 1, 0].tolist() == [448.0, -448.0, 0.0, 0.5]
    assert cache[1, 1, 1, 0].tolist() == [448.0, -448.0, 0.0, 2.0]


def test_scales_belong_to_float8_caches() -> None:
    batch = Batch(**BATCHES["mixed"])
    with pytest.raises(ValueError, match=r"k_scale 2\.0 .* must be 1 for a cache of torch\.float32"):
        batch.run(scale=0.3, k_scale=2.0)


def test_scale_matters() -> None:
    batch = Batch(**BATCHES["mixed"])
    assert not torch.allclose(batch.run(scale=0.3), batch.run(scale=1 / math.sqrt(HEAD_DIM) * 3), atol=1e-3)
