"""The row kernels against float64 references: fresh random inputs, poisoned outputs.

Not collected by itself: `test_triton_kernels.py` runs it in a process of its own, in Triton's interpreter where
there is no GPU and on the GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tercet.ops import triton_rows, write_kv
from tercet.ops.norm import rms_norm
from tests.ops.triton_harness import DEVICE, DTYPES, INTERPRETED, MARKS, assert_close, poison, randn, seed

__all__ = ["poison", "seed"]  # fixtures
pytestmark = MARKS


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_cache_takes_scaled_and_saturated_values(dtype: torch.dtype, seed: int) -> None:
    scale_A1 = torch.tensor([1, 1, 0.125, 0.125, 0.5, 0.5], device=DEVICE)[:, None]
    values = randn(5, 6, 16) * 200
    if INTERPRETED:  # its conversion does not round: give it nothing to round
        values = values.to(torch.float8_e4m3fn).float()
    values[1] *= 64  # too large
    qkv = (values * scale_A1).to(dtype)
    one = torch.ones(5, 16, device=DEVICE, dtype=dtype)
    slots = torch.randperm(24)[:5].to(DEVICE)
    caches = [torch.zeros(2, 6, 4, 2, 16, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
    triton_rows.rope_and_write_kv(qkv, one, one * 0, caches[0], slots, k_scale=0.125, v_scale=0.5)
    write_kv(qkv[:, 2:4], qkv[:, 4:], caches[1], slots, k_scale=0.125, v_scale=0.5)
    assert torch.equal(caches[0].float(), caches[1].float())
    assert caches[0].float().abs().max() == 448


def test_scales_belong_to_float8_caches() -> None:
    cache, one = torch.zeros(2, 2, 4, 1, 4, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    slots = torch.tensor([1], device=DEVICE)
    with pytest.raises(ValueError, match=r"k_scale 2\.0 .* must be 1 for a cache of torch\.float32"):
        triton_rows.rope_and_write_kv(torch.ones(1, 3, 4, device=DEVICE), one, one, cache, slots, k_scale=2.0)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (3, 4096), (5, 9001)])
def test_logsumexp_and_rank(rows: int, vocab: int, seed: int) -> None:
    logits = randn(rows, vocab) * 5
    logits[0, : vocab // 2] = float("-inf")
    chosen = logits[torch.arange(rows), torch.randint(vocab, (rows,))]
    total, rank = triton_rows.logsumexp_and_rank(logits, chosen)
    assert_close(total, logits.double().logsumexp(-1), torch.float32)
    assert torch.equal(rank, (logits > chosen[:, None]).sum(-1, dtype=torch.int32) + 1)
    alone = torch.cat(
        [triton_rows.logsumexp_and_rank(row[None], c[None])[0] for row, c in zip(logits, chosen, strict=True)]
    )
    assert torch.equal(alone, total)
