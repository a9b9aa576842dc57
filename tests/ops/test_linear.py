"""Linear layers: the references, and which kernel the table names for a number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from tercet import ops
from tercet.ops import PrecedingNorm, invariance, linear_configs, triton_support
from tercet.ops.linear_configs import LinearConfig, choose, invariant_config
from tercet.ops.linear_table import TABLE

HOPPER_TABLE = {
    ("linear", 64, 32): {1: "gemv o8 k32 w4", 4: "separate", 16: "grouped m16 o16 k16 g2 s3 w4"},
}


def test_references_are_the_operations_one_after_another() -> None:
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    weight, bias, norm_weight = torch.randn(12, 8), torch.randn(12), torch.randn(8)
    norm = PrecedingNorm(residual, norm_weight, 1e-5, 1.0)
    normed = F.rms_norm(x + residual, (8,), norm_weight + 1.0, 1e-5)
    product = F.linear(normed, weight, bias)
    out, total = ops.add_rms_norm_linear(x, norm, weight, bias)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(out, product)
    for activation, function in (
        ("silu", F.silu),
        ("gelu_tanh", lambda gate: F.gelu(gate, approximate="tanh")),
    ):
        expected = function(product[:, :6]) * product[:, 6:]
        out, total = ops.add_rms_norm_gated_linear(x, norm, weight, bias, activation)
        torch.testing.assert_close(out, expected)
        assert torch.equal(total, x + residual)
        torch.testing.assert_close(ops.gated_linear(normed, weight, bias, activation), expected)


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear_configs, "_is_measured", lambda device: True)
    monkeypatch.setattr(linear_configs, "TABLE", HOPPER_TABLE)
    linear_configs._measured.cache_clear()
    yield
    linear_configs._measured.cache_clear()


@pytest.mark.usefixtures("_hopper")
def test_the_table_names_the_kernel_for_as_many_rows_or_more() -> None:
    weight = torch.empty(64, 32, dtype=torch.bfloat16)

    def chosen(num_rows: int) -> str | None:
        config = choose("linear", weight.new_empty(num_rows, 32), weight)
        return None if config is None else config.kernel

    assert [chosen(n) for n in (0, 1, 2, 4, 5, 16, 17)] == [
        None,
        "gemv",
        None,
        None,
        "grouped",
        "grouped",
        None,
    ]
    x = weight.new_empty(1, 32)
    assert choose("gated", x, weight) is None
    assert choose("linear", x, weight[:32]) is None
    assert choose("linear", x.float(), weight.float()) is None


def test_batch_invariance_takes_one_order_for_all_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariance, "_is_on", True)
    weight = torch.empty(64, 32, dtype=torch.bfloat16)
    for num_rows in (1, 16, 64, 65, 1000, 10_000):
        config = choose("linear", weight.new_empty(num_rows, 32), weight)
        assert config == invariant_config(num_rows, torch.bfloat16)
        assert config is not None
        assert config.kernel == "tiled"
        assert config.block_m >= 64  # below, other instructions would multiply
        assert choose("gated", weight.new_empty(num_rows, 32), weight) is None
    assert len({invariant_config(n, torch.float32) for n in (1, 64, 4096)}) == 1


def test_configs_are_read_as_they_are_written() -> None:
    config = LinearConfig("grouped", block_m=32, block_o=8, block_k=128, groups=4, stages=3, warps=8)
    assert str(config) == "grouped m32 o8 k128 g4 s3 w8"
    assert LinearConfig.parse(str(config)) == config
    assert str(LinearConfig("gemv", block_o=4, block_k=256)) == "gemv o4 k256 w4"
    with pytest.raises(ValueError, match="no kernel 'gemm'; there are: gemv, grouped, tiled"):
        LinearConfig.parse("gemm o8 k8")
    with pytest.raises(ValueError, match="'s3' is no field of gemv, which has okw"):
        LinearConfig.parse("gemv o8 k8 s3")


def test_every_entry_of_the_table_can_be_launched() -> None:
    for (kind, _, size), by_rows in TABLE.items():
        assert kind in ("linear", "gated", "norm_linear", "norm_gated")
        for most_rows, text in by_rows.items():
            if text == linear_configs.SEPARATE:
                continue
            config = LinearConfig.parse(text)
            assert config.kernel != "gemv" or most_rows <= linear_configs.MAX_GEMV_ROWS
            assert "norm" not in kind or (config.kernel == "gemv" and config.block_k >= size)


def test_programmatic_launches_are_for_devices_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_support.programmatic_launch(torch.device("cpu"), 1) == {}
    monkeypatch.setattr(triton_support, "_has_programmatic_launch", lambda device: True)
    assert triton_support.programmatic_launch(torch.device("cuda"), 1) == {"launch_pdl": True}
    monkeypatch.setattr(triton_support, "_programmatic_launch", True)  # puts it back afterwards
    triton_support.set_programmatic_launch(False)
    assert triton_support.programmatic_launch(torch.device("cuda"), 1) == {}
