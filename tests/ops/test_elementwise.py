"""The small operations against their definitions, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tercet import ops


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm(dtype: torch.dtype, offset: float) -> None:
    x, residual, weight = randn(5, 3, 16).to(dtype), randn(5, 3, 16, seed=1).to(dtype), randn(16).to(dtype)

    def expected(x: Tensor) -> Tensor:
        x = x.double()
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * (offset + weight.double())

    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    normed = ops.rms_norm(x, weight, 1e-3, offset)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), expected(x), atol=tolerance, rtol=tolerance)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-3, offset)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed.double(), expected(x + residual), atol=tolerance, rtol=tolerance)


def test_gated_activations() -> None:
    gate, up = randn(4, 6).double(), randn(4, 6, seed=1).double()
    both = torch.cat((gate, up), -1)
    torch.testing.assert_close(ops.silu_and_mul(both), gate / (1 + (-gate).exp()) * up)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(ops.gelu_tanh_and_mul(both), 0.5 * gate * (1 + inner.tanh()) * up)


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_rotary_turns_pairs_by_their_angle(rotary_dim: int) -> None:
    x, angles = randn(5, 3, 8), randn(5, rotary_dim // 2, seed=1)
    both = torch.cat((angles, angles), -1)
    got = ops.apply_rotary(x, both.cos(), both.sin())
    half = rotary_dim // 2
    pairs = torch.complex(x[..., :half], x[..., half:rotary_dim])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), -1)
    torch.testing.assert_close(got, expected)


def test_keys_and_values_go_to_their_slots_alone() -> None:
    cache = torch.zeros(2, 4, 2, 3, 5)
    k, v = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    ops.write_kv(k, v, cache, torch.tensor([7, 2, 5, 0]))
    for token, (block, offset) in enumerate([(3, 1), (1, 0), (2, 1), (0, 0)]):
        assert torch.equal(cache[0, block, offset], k[token])
        assert torch.equal(cache[1, block, offset], v[token])
    assert cache.count_nonzero() == k.count_nonzero() + v.count_nonzero()


def test_cache_stays_finite_and_keeps_its_dtype() -> None:
    cache = torch.zeros(2, 2, 2, 1, 4, dtype=torch.bfloat16)
    k = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]).view(1, 1, 4)
    ops.write_kv(k, k, cache, torch.tensor([3]))
    assert cache[:, 1, 1, 0].tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2


def test_heads_that_do_not_fit_the_cache_are_refused() -> None:
    cache, slots = torch.zeros(2, 2, 2, 1, 4), torch.tensor([3])
    with pytest.raises(ValueError, match=r"do not fit the cache \(2, 2, 2, 1, 4\)"):
        ops.write_kv(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), cache, slots)


@pytest.mark.parametrize("norm", [None, 0.0, 1.0])
def test_rope_and_write_kv_is_its_parts_one_after_another(norm: float | None) -> None:
    qkv, angles = randn(4, 9, 8), randn(4, 3, seed=1)
    weights = randn(8, seed=2), randn(8, seed=3)
    both = torch.cat((angles, angles), -1)
    cos, sin, slots = both.cos(), both.sin(), torch.tensor([7, 2, 5, 0])
    got_cache, cache = torch.zeros(2, 2, 4, 2, 2, 8).unbind(0)
    got = ops.rope_and_write_kv(
        qkv,
        cos,
        sin,
        got_cache,
        slots,
        qk_norm=None if norm is None else weights,
        eps=1e-3,
        weight_offset=norm or 0.0,
    )
    q, k, v = qkv.split([5, 2, 2], dim=1)
    if norm is not None:
        q, k = ops.rms_norm(q, weights[0], 1e-3, norm), ops.rms_norm(k, weights[1], 1e-3, norm)
    ops.write_kv(ops.apply_rotary(k, cos, sin), v, cache, slots)
    torch.testing.assert_close(got, ops.apply_rotary(q, cos, sin))
    torch.testing.assert_close(got_cache, cache)


def test_rope_and_write_kv_refuses_heads_that_do_not_fit() -> None:
    one, cache = torch.ones(1, 4), torch.zeros(2, 2, 2, 1, 4)
    with pytest.raises(ValueError, match="2 heads do not fit"):
        ops.rope_and_write_kv(torch.zeros(1, 2, 4), one, one, cache, torch.tensor([1]))
    with pytest.raises(ValueError, match="do not fit the cache"):
        ops.rope_and_write_kv(torch.zeros(1, 3, 8), one, one, cache, torch.tensor([1]))
