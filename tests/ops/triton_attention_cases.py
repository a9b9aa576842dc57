"""The paged attention kernel against float64 references: fresh random inputs, poisoned outputs.

Not collected by itself: `test_triton_kernels.py` runs it in a process of its own, in Triton's interpreter where
there is no GPU and on the GPU where there is one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tercet.ops import AttentionMetadata, invariance, triton_attention, write_kv
from tercet.ops.triton_attention import Tiles
from tests.ops.test_attention import expected_output
from tests.ops.triton_harness import DEVICE, DTYPES, INTERPRETED, MARKS, assert_close, poison, randn, seed

__all__ = ["poison", "seed"]  # fixtures
pytestmark = MARKS


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
        cache_dtype: torch.dtype | None = None,
        kv_scales: tuple[float, float] = (1.0, 1.0),
        spare_len: int = 0,
    ) -> None:
        num_heads, num_kv_heads = heads
        self.query_lens = [1] * len(decode_lens) + [query for query, _ in chunks]
        self.seq_lens = decode_lens + [length for _, length in chunks]
        counts = [-(-length // block_size) for length in self.seq_lens]
        order = (torch.randperm(sum(counts)) + 1).tolist()
        shape = (2, sum(counts) + 1, block_size, num_kv_heads, head_dim)
        self.kv_cache = torch.full(shape, 300.0, device=DEVICE).to(cache_dtype or dtype)
        self.q_THD = randn(sum(self.query_lens), num_heads, head_dim, dtype=dtype)
        width = max(counts) + 2 + spare_len // block_size
        self.keys_values: list[tuple[Tensor, Tensor]] = []
        tables, starts = [], [0]
        for query_len, length, count in zip(self.query_lens, self.seq_lens, counts, strict=True):
            blocks, order = order[:count], order[count:]
            own = torch.tensor([blocks[i // block_size] * block_size + i % block_size for i in range(length)])
            kv = randn(2, length, num_kv_heads, head_dim, dtype=dtype)
            k_scale, v_scale = kv_scales
            write_kv(kv[0], kv[1], self.kv_cache, own.to(DEVICE), k_scale=k_scale, v_scale=v_scale)
            if cache_dtype is not None:  # what the cache holds, not what was meant
                stored = (kv.float() / torch.tensor(kv_scales, device=DEVICE)[:, None, None, None]).to(
                    cache_dtype
                )
                kv = stored.float() * torch.tensor(kv_scales, device=DEVICE)[:, None, None, None]
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

    def bounded(self, decodes: int, chunks: int, tokens: int) -> AttentionMetadata:
        """The same step as a captured one has it: counts on the device, bounds on the host, garbage behind."""
        meta = self.meta
        rows = decodes + chunks
        table = torch.full((rows, meta.block_table_BN.shape[1]), 1 << 30, dtype=torch.int32, device=DEVICE)
        lens = torch.full((rows,), 1 << 30, dtype=torch.int32, device=DEVICE)
        starts = torch.full((rows + 1,), -5, dtype=torch.int32, device=DEVICE)
        there = len(self.seq_lens)
        table[:there], lens[:there] = meta.block_table_BN, meta.seq_lens_B
        starts[: there + 1] = meta.query_start_B1
        return dataclasses.replace(
            meta,
            num_decodes=decodes,
            block_table_BN=table,
            seq_lens_B=lens,
            query_start_B1=starts,
            max_query_len=tokens,
            max_seq_len=meta.block_table_BN.shape[1] * self.kv_cache.shape[2],
            chunk_query_lens=(),
            chunk_seq_lens=(),
            counts=torch.tensor(
                [meta.num_decodes, len(meta.chunk_query_lens)], dtype=torch.int32, device=DEVICE
            ),
            num_chunks=chunks,
            num_chunk_tokens=tokens,
            memo={},
        )

    def run(self, **arguments: Any) -> Tensor:
        return triton_attention.paged_attention(self.q_THD, self.kv_cache, self.meta, **arguments)

    def expected(self, scale: float, *masks: Any, **named: Any) -> Tensor:
        return expected_output(self, scale, *masks, **named)


BATCHES: dict[str, dict[str, Any]] = {
    "decodes": {"decode_lens": [1, 130, 64, 65], "chunks": [], "heads": (2, 1)},
    "one decode": {"decode_lens": [117], "chunks": []},
    "prefills": {"decode_lens": [], "chunks": [(75, 75), (1, 1), (40, 40)]},
    "short chunk of a long context": {"decode_lens": [], "chunks": [(3, 300)]},
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
    "short chunks": {
        "decode_lens": [70] * 40,
        "chunks": [(16, 8000), (1, 3000), (100, 5000)],
        "heads": (16, 8),
    },
    "one long among many": {"decode_lens": [60] * 300 + [9000], "chunks": [], "heads": (16, 8)},
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


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("per_processor", [1, 9])
def test_any_number_of_splits(per_processor: int, least: int, seed: int) -> None:
    decode = Tiles(16, 16, 4, 2, per_processor, least)
    prefill = Tiles(32, 16, 4, 2, per_processor, least)
    batch = Batch([110, 32, 1], [(3, 100), (20, 50)], heads=(2, 1))
    for window in (None, 40):
        got = batch.run(scale=0.3, sliding_window=window, decode=decode, prefill=prefill)
        assert_close(got, batch.expected(0.3, window), torch.float32)


def test_queries_may_be_a_view(seed: int) -> None:
    batch = Batch([9, 40], [(3, 30)])
    expected = batch.expected(0.3)
    wide = randn(5, 10, 16)
    wide[:, 2:6] = batch.q_THD
    batch.q_THD = wide[:, 2:6]
    assert_close(batch.run(scale=0.3), expected, torch.float32)


def test_counters_are_left_as_they_were_found(seed: int) -> None:
    batch = Batch([150], [(3, 140)], heads=(2, 1))
    first = batch.run(scale=0.3)
    assert not triton_attention._arrivals(batch.q_THD.device, 1).any()
    assert torch.equal(first, batch.run(scale=0.3))


@pytest.mark.parametrize(
    ("name", "invariant"),
    [("decodes", False), ("prefills", False), ("mixed", False), ("mixed", True), ("groups of 3", False)],
)
def test_counts_on_the_device(name: str, invariant: bool, seed: int) -> None:
    window = random.Random(seed).choice([None, 20])
    batch = Batch(**BATCHES[name])
    tokens, expected = batch.q_THD.shape[0], batch.expected(0.2, window)
    batch.meta = batch.bounded(batch.meta.num_decodes + 3, len(batch.meta.chunk_query_lens) + 2, tokens + 5)
    batch.q_THD = torch.cat((batch.q_THD, torch.full_like(batch.q_THD[:5], float("nan"))))
    invariance.set_batch_invariant(invariant)
    try:
        got = batch.run(scale=0.2, sliding_window=window)
    finally:
        invariance.set_batch_invariant(False)
    assert_close(got[:tokens], expected, torch.float32)
    assert got[tokens:].isnan().all()  # nothing was written there


def test_counts_of_nothing(seed: int) -> None:
    batch = Batch([9], [(3, 30)])
    batch.meta = batch.bounded(4, 2, 8)
    assert batch.meta.counts is not None
    batch.meta.counts.zero_()
    assert batch.run(scale=0.2).isnan().all()


@pytest.fixture
def invariant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:  # its products are BLAS's, which sums a row differently by its place in the matrix
        from triton.runtime import interpreter

        def dot(_builder: Any, a: Any, b: Any, acc: Any, *_options: Any) -> Any:
            product = np.einsum("mk,kn->mn", a.data, b.data, optimize=False)
            return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    invariance.set_batch_invariant(True)
    yield
    invariance.set_batch_invariant(False)


def alone(batch: Batch, row: int, first: int, query_len: int) -> Batch:
    """A batch of one: so many tokens of a row from one of its positions on, as if the rest came later."""
    one = object.__new__(Batch)
    one.__dict__.update(batch.__dict__)
    token = sum(batch.query_lens[:row])
    start = first - (batch.seq_lens[row] - batch.query_lens[row])
    one.q_THD = batch.q_THD[token + start : token + start + query_len]
    length, is_decode = first + query_len, query_len == 1
    one.meta = dataclasses.replace(
        batch.meta,
        num_decodes=int(is_decode),
        block_table_BN=batch.meta.block_table_BN[row : row + 1],
        seq_lens_B=torch.tensor([length], dtype=torch.int32, device=DEVICE),
        query_start_B1=torch.tensor([0, query_len], dtype=torch.int32, device=DEVICE),
        max_query_len=query_len,
        max_seq_len=length,
        chunk_query_lens=() if is_decode else (query_len,),
        chunk_seq_lens=() if is_decode else (length,),
    )
    return one


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize("dtype", DTYPES[-1:] if not INTERPRETED else [torch.float32])
@pytest.mark.parametrize("window", [None, 30])
def test_a_row_has_the_same_bits_in_any_batch(
    window: int | None, dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 40 if INTERPRETED else 1100
    if INTERPRETED:  # several segments within what the interpreter can do
        tiles = Tiles(32, 8, 4, 2, 2, 1, segment=2)
        monkeypatch.setattr(triton_attention, "invariant_tiles", lambda *_: tiles)
    batch = Batch(
        [size - 9, 3], [(size, size), (9, 40)], heads=(4, 2), head_dim=16 if INTERPRETED else 128, dtype=dtype
    )
    whole = batch.run(scale=0.2, sliding_window=window)
    assert_close(whole, batch.expected(0.2, window), dtype)
    # The long prompt in pieces, each in a batch of its own; a piece of one token is a decode.
    for first, query_len in ((0, 13), (13, 7), (20, 1), (21, size - 22), (size - 1, 1)):
        got = alone(batch, 2, first, query_len).run(scale=0.2, sliding_window=window)
        assert torch.equal(got, whole[2 + first : 2 + first + query_len]), (first, query_len)
    for row, first in ((0, size - 10), (1, 2)):
        got = alone(batch, row, first, 1).run(scale=0.2, sliding_window=window)
        assert torch.equal(got, whole[row : row + 1]), row
    batch.meta = batch.bounded(5, 3, batch.q_THD.shape[0])
    assert torch.equal(batch.run(scale=0.2, sliding_window=window), whole)


@pytest.mark.parametrize("name", ["decodes", "mixed", "odd head size"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_cache(name: str, dtype: torch.dtype, seed: int) -> None:
    if INTERPRETED and dtype != torch.float32 and name != "mixed":
        pytest.skip("slow in the interpreter")
    batch = Batch(**BATCHES[name], dtype=dtype, cache_dtype=torch.float8_e4m3fn, kv_scales=(0.5, 0.25))
    got = batch.run(scale=0.2, k_scale=0.5, v_scale=0.25)
    assert got.dtype == dtype
    assert_close(got, batch.expected(0.2), dtype)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("heads", [(16, 8), (32, 8)])
def test_one_capture_serves_every_step_of_its_size(heads: tuple[int, int], seed: int) -> None:
    """A graph captured for one batch, replayed for others whose numbers and lengths it finds on the device."""
    batches = [
        Batch([257, 1, 900], [(30, 700), (64, 64)], heads=heads, head_dim=128, dtype=torch.bfloat16),
        Batch([4000], [(5, 6000)], heads=heads, head_dim=128, dtype=torch.bfloat16),
        Batch(list(range(1, 65)), [], heads=heads, head_dim=128, dtype=torch.bfloat16),
        Batch([], [(200, 300)], heads=heads, head_dim=128, dtype=torch.bfloat16),
    ]
    blocks = max(batch.kv_cache.shape[1] for batch in batches)
    cache = torch.zeros(2, blocks, 16, heads[1], 128, dtype=torch.bfloat16, device=DEVICE)
    q = torch.zeros(256, heads[0], 128, dtype=torch.bfloat16, device=DEVICE)
    fixed = dataclasses.replace(
        batches[0].bounded(64, 8, 256), block_table_BN=torch.zeros(72, 512, dtype=torch.int32, device=DEVICE),
        max_seq_len=8192,
    )  # fmt: skip

    def step() -> Tensor:
        return triton_attention.paged_attention(q, cache, fixed, scale=0.1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for batch in batches * 2:
        own = batch.bounded(64, 8, 256)
        assert fixed.counts is not None and own.counts is not None
        fixed.counts.copy_(own.counts)
        fixed.seq_lens_B.copy_(own.seq_lens_B)
        fixed.query_start_B1.copy_(own.query_start_B1)
        fixed.block_table_BN[:, : own.block_table_BN.shape[1]] = own.block_table_BN
        cache[:, : batch.kv_cache.shape[1]] = batch.kv_cache
        q[: batch.q_THD.shape[0]] = batch.q_THD
        graph.replay()
        assert_close(captured[: batch.q_THD.shape[0]], batch.expected(0.1), torch.bfloat16)
