"""Triton bodies of the operations that work on one token at a time; `triton_rows.py` launches them.

All compute in float32 and round once, where they store. With PDL (programmatic dependent launch) a program starts
before its predecessor has finished, waits for it, and lets its successor start: see `programmatic_launch`.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

INFINITY = tl.constexpr(float("inf"))
FP8_MAX = tl.constexpr(448.0)  # float8_e4m3fn, which has no infinity
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def rms_norm_kernel(
    out, total, x, residual, weight, eps, weight_offset,
    D: tl.constexpr, D_PAD: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row): out = norm(x), or with ADD total = x + residual and out = norm(total)."""
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, D_PAD)
    keep = d < D
    factor = tl.load(weight + d, mask=keep, other=0.0).to(tl.float32) + weight_offset
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    value = tl.load(x + row + d, mask=keep, other=0.0)
    if ADD:
        added = value.to(tl.float32) + tl.load(residual + row + d, mask=keep, other=0.0).to(tl.float32)
        value = added.to(total.dtype.element_ty)
        tl.store(total + row + d, value, mask=keep)
    value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    tl.store(out + row + d, (value * scale * factor).to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def rope_and_write_kv_kernel(
    q_out, kv_cache, v_offset, qkv, cos, sin, slots, q_weight, k_weight, eps, weight_offset, k_divisor, v_divisor,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, NORM: tl.constexpr,
    D_PAD: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, block of heads): queries go to q_out, keys and values to the token's slot.

    Element d < R is turned with its partner at distance R / 2, which is loaded a second time (from the L1 cache)
    rather than exchanged between threads.
    """
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    d = tl.arange(0, D_PAD)[None, :]
    keep = (head < H + 2 * K) & (d < D)
    is_query, is_value = head < H, head >= H + K
    partner = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
    base = qkv + token * ((H + 2 * K) * D) + head * D
    value = tl.load(base + d, mask=keep, other=0.0).to(tl.float32)
    other = tl.load(base + partner, mask=keep, other=0.0).to(tl.float32)
    turned_value, turned_other = value, other
    if NORM:
        scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)[:, None]
        q_factor = tl.load(q_weight + d, mask=d < D, other=0.0).to(tl.float32)
        k_factor = tl.load(k_weight + d, mask=d < D, other=0.0).to(tl.float32)
        turned_value = value * scale * (tl.where(is_query, q_factor, k_factor) + weight_offset)
        q_factor = tl.load(q_weight + partner, mask=d < D, other=0.0).to(tl.float32)
        k_factor = tl.load(k_weight + partner, mask=d < D, other=0.0).to(tl.float32)
        turned_other = other * scale * (tl.where(is_query, q_factor, k_factor) + weight_offset)
    angle = token * R + d
    cosine = tl.load(cos + angle, mask=d < R, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=d < R, other=0.0).to(tl.float32)
    turned = turned_value * cosine + tl.where(d < R // 2, -turned_other, turned_other) * sine
    result = tl.where(is_value, value, turned).to(q_out.dtype.element_ty)
    tl.store(q_out + token * (H * D) + head * D + d, result, mask=keep & is_query)
    # Rounded first: what overflows the dtype is not finite either.
    is_finite = tl.abs(result.to(tl.float32)) < INFINITY
    stored = tl.where(is_finite, result, 0.0)
    if kv_cache.dtype.element_ty == tl.float8e4nv:
        stored = stored.to(tl.float32) / tl.where(is_value, v_divisor, k_divisor)
        stored = tl.minimum(tl.maximum(stored, -FP8_MAX), FP8_MAX)
    stored = stored.to(kv_cache.dtype.element_ty)
    slot = kv_cache + tl.load(slots + token) * (K * D)
    tl.store(slot + (head - H) * D + d, stored, mask=keep & (head >= H) & (head < H + K))
    tl.store(slot + v_offset + (head - H - K) * D + d, stored, mask=keep & is_value)


@triton.jit
def gated_activation_kernel(
    out, gate_up, F: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Program (row, block of F): act(gate) * up."""
    if PDL:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep = f < F
    gate = tl.load(gate_up + row * (2 * F) + f, mask=keep, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * F) + F + f, mask=keep, other=0.0).to(tl.float32)
    if GELU:  # 0.5 (1 + tanh(y)) = sigmoid(2 y)
        inner = SQRT_2_OVER_PI * (gate + 0.044715 * gate * gate * gate)
        result = gate * tl.sigmoid(2.0 * inner) * up
    else:
        result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * F + f, result.to(out.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["V"])
def logsumexp_and_rank_kernel(total, rank, logits, chosen, V, BLOCK: tl.constexpr):
    """Program (row): log of the sum of exponentials, and one more than the number of greater logits."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    chosen_logit = tl.load(chosen + row)
    best_N = tl.full([BLOCK], -INFINITY, tl.float32)
    above_N = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        value = tl.load(logits + v, mask=v < V, other=-INFINITY)
        best_N = tl.maximum(best_N, value)
        above_N += (value > chosen_logit).to(tl.int32)
    best = tl.max(best_N, 0)
    sum_N = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK)
        sum_N += tl.exp(tl.load(logits + v, mask=v < V, other=-INFINITY) - best)
    tl.store(total + row, best + tl.log(tl.sum(sum_N, 0)))
    tl.store(rank + row, 1 + tl.sum(above_N, 0))
