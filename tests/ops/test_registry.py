"""Choosing an implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tercet import ops
from tercet.errors import ConfigError
from tercet.ops import registry
from tercet.ops.registry import Operation

HALF = torch.float16


@pytest.fixture
def doubling() -> Iterator[Operation[[Tensor], str]]:
    """An operation with a kernel for half precision, which says what ran."""

    @registry.operation("test_doubling")
    def doubling(x: Tensor) -> str:
        return "reference"

    @doubling.implementation("fast", supports=lambda device, dtype: dtype == HALF)
    def _fast(x: Tensor) -> str:
        return "fast"

    yield doubling
    del registry._operations["test_doubling"]


def test_kernel_runs_where_it_serves_and_the_reference_elsewhere(doubling: Operation[[Tensor], str]) -> None:
    assert doubling.implementations == ("fast", "reference")
    assert doubling(torch.zeros(1, dtype=HALF)) == "fast"
    assert doubling(torch.zeros(1)) == "reference"


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        ("", "fast"),
        ("reference", "reference"),
        ("test_doubling=reference", "reference"),
        ("reference, test_doubling=fast", "fast"),
        ("rms_norm=reference", "fast"),
    ],
)
def test_environment_overrides_the_choice(
    value: str, chosen: str, doubling: Operation[[Tensor], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERCET_OPS", value)
    doubling.forget_choices()
    assert doubling(torch.zeros(1, dtype=HALF)) == chosen


@pytest.mark.parametrize(
    "value", ["test_doubling=slow", "test_doubling=fast", "no_such_op=reference", "fast", "test_doubling="]
)
def test_override_that_cannot_be_honoured_is_refused(
    value: str, doubling: Operation[[Tensor], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERCET_OPS", value)
    with pytest.raises(ConfigError, match="TERCET_OPS"):
        doubling(torch.zeros(1))


def test_names_are_taken_once(doubling: Operation[[Tensor], str]) -> None:
    with pytest.raises(ValueError, match="test_doubling"):
        registry.operation("test_doubling")(lambda x: "again")
    with pytest.raises(ValueError, match="fast"):
        doubling.implementation("fast", supports=lambda device, dtype: True)(lambda x: "again")


def test_every_operation_has_a_reference() -> None:
    named = ops.operations()
    assert {"paged_attention", "write_kv", "rms_norm", "apply_rotary", "silu_and_mul"} <= named.keys()
    assert all("reference" in implementations for implementations in named.values())
