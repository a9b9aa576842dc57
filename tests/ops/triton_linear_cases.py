"""The linear layers' kernels against float64 references; run by `test_triton_kernels.py` as `triton_cases.py` is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.ops import PrecedingNorm, invariance, triton_linear
from tercet.ops.linear import Activation, linear
from tercet.ops.linear_configs import LinearConfig, invariant_config
from tercet.ops.triton_support import set_programmatic_launch
from tests.ops.triton_harness import (  # noqa: F401
    DEVICE,
    DTYPES,
    INTERPRETED,
    MARKS,
    assert_close,
    poison,
    randn,
    seed,
)

pytestmark = MARKS
# (rows, D, O): whole tiles; ragged in every dimension; D shorter than a tile
SIZES = [(2, 128, 32), (3, 88, 24), (1, 24, 40)]
CONFIGS = [
    "gemv o8 k128 w4",
    "gemv o8 k32 w4",  # several steps
    "grouped m16 o16 k16 g2 s2 w2",
    "grouped m16 o8 k16 g4 s3 w4",
    "tiled m16 o16 k32 s2 w4",
]


def weights(out_size: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight that keeps the size of what it multiplies, and a bias."""
    return (randn(out_size, size) / size**0.5).to(dtype), randn(out_size, dtype=dtype)


def activated(gate_up: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size", "out_size"), SIZES)
@pytest.mark.parametrize("config", CONFIGS)
def test_linear(seed: int, config: str, rows: int, size: int, out_size: int, dtype: torch.dtype) -> None:  # noqa: F811
    x = randn(rows, size, dtype=dtype)
    weight, bias = weights(out_size, size, dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_close(triton_linear.linear(LinearConfig.parse(config), x, weight, bias), exact, dtype)
    got = triton_linear.linear(LinearConfig.parse(config), x[None], weight)
    assert_close(got[0], exact - bias.double(), dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("config", CONFIGS)
def test_gated_linear(seed: int, config: str, activation: Activation) -> None:  # noqa: F811
    for dtype, (rows, size, out_size) in zip((torch.float32, torch.float16), SIZES, strict=False):
        x = randn(rows, size, dtype=dtype)
        weight, bias = weights(2 * out_size, size, dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        got = triton_linear.linear(LinearConfig.parse(config), x, weight, bias, activation=activation)
        assert_close(got, activated(exact, activation), dtype)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_before_linear(seed: int, activation: Activation | None, offset: float) -> None:  # noqa: F811
    for dtype in DTYPES:
        for rows, size, out_size in SIZES:
            x, residual = randn(rows, size, dtype=dtype), randn(rows, size, dtype=dtype)
            norm = PrecedingNorm(residual, randn(size, dtype=dtype), 1e-3, offset)
            weight, bias = weights(out_size, size, dtype)
            got, total = triton_linear.add_rms_norm_linear(
                LinearConfig.parse("gemv o8 k128 w4"), x, norm, weight, bias, activation=activation
            )
            assert torch.equal(total, x + residual)
            factor = norm.weight_D.double() + offset
            normed = F.rms_norm(total.double(), (size,), factor, 1e-3).to(dtype)
            exact = F.linear(normed.double(), weight.double(), bias.double())
            assert_close(got, exact if activation is None else activated(exact, activation), dtype)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(9, 24, device=DEVICE), torch.ones(16, 24, device=DEVICE)
    gemv = LinearConfig.parse("gemv o8 k16 w4")
    with pytest.raises(ValueError, match="1 to 8 rows; got 9"):
        triton_linear.linear(gemv, x, weight)
    with pytest.raises(ValueError, match="does not see a whole row of 24"):
        triton_linear.add_rms_norm_linear(gemv, x[:1], PrecedingNorm(x[:1], x[0], 1e-6), weight)
    with pytest.raises(ValueError, match=r"x \[9, 24\], weight \[16, 24\] and bias \[24\] do not fit"):
        triton_linear.linear(LinearConfig.parse("tiled m16 o16 k16 w4"), x, weight, x[0])
    with pytest.raises(ValueError, match="must be contiguous"):
        triton_linear.linear(LinearConfig.parse("tiled m16 o16 k16 w4"), x, weight.T.contiguous().T)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter's products are numpy's, in an order of its own")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(
    seed: int,  # noqa: F811
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(invariance, "_is_on", True)
    num_rows = 700
    configs = {invariant_config(rows, dtype) for rows in (1, 64, 65, 256, 257, num_rows)}
    assert len(configs) == (1 if dtype == torch.float32 else 3)
    for size, out_size in ((576, 960), (1024, 192)):
        x = randn(num_rows, size, dtype=dtype)
        weight, bias = weights(out_size, size, dtype)
        whole = linear(x, weight, bias)
        assert_close(whole, F.linear(x.double(), weight.double(), bias.double()), dtype)
        for rows in (1, 2, 17, 64, 65, 200, 256, 300):
            start = int(torch.randint(num_rows - rows, ()))
            assert torch.equal(linear(x[start : start + rows], weight, bias), whole[start : start + rows])


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
def test_programmatic_launches_change_no_bits(seed: int) -> None:  # noqa: F811
    size, dtype = 1024, torch.bfloat16
    x, residual, norm_weight = (
        randn(2, size, dtype=dtype),
        randn(2, size, dtype=dtype),
        randn(size, dtype=dtype),
    )
    layers = [[weights(size, size, dtype)[0] for _ in range(3)] for _ in range(8)]
    configs = [LinearConfig.parse(text) for text in ("gemv o4 k1024 w4", CONFIGS[3], CONFIGS[4])]

    def chain() -> Tensor:
        y, total = x, residual
        for first, second, third in layers:
            norm = PrecedingNorm(total, norm_weight, 1e-6)
            y, total = triton_linear.add_rms_norm_linear(configs[0], y, norm, first)
            y = triton_linear.linear(configs[1], y, second)
            y = triton_linear.linear(configs[2], y, third)
        return y

    torch.cuda.synchronize()
    programmatic = [chain() for _ in range(10)]
    set_programmatic_launch(False)
    try:
        plain = chain()
    finally:
        set_programmatic_launch(True)
    assert plain.isfinite().all()
    assert all(torch.equal(out, plain) for out in programmatic)
