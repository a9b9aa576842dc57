"""Single checks: what passes comes back in canonical form, what does not is shown short."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet import ValidationError
from tercet.frontend import validation as v


@given(st.integers())
def test_integers_pass_exactly_in_range(value: int) -> None:
    if 0 <= value <= 100:
        assert v.check_int("x", value, 0, 100) == value
    else:
        with pytest.raises(ValidationError, match="x: must be in"):
            v.check_int("x", value, 0, 100)


@given(st.floats())
def test_floats_pass_exactly_in_range(value: float) -> None:
    if math.isfinite(value) and -1 <= value <= 1:
        assert v.check_float("x", value, -1, 1) == value
    else:
        with pytest.raises(ValidationError, match="x: must be"):
            v.check_float("x", value, -1, 1)


def test_numbers_of_numpy_become_plain_ones() -> None:
    assert type(v.check_int("x", np.int16(3), 0)) is int
    assert type(v.check_float("x", np.float32(0.5))) is float
    assert v.check_int_list("x", (np.int64(1), 2), 5) == [1, 2]


def test_fault_in_a_list_is_reported_with_its_index() -> None:
    with pytest.raises(ValidationError, match=r"x\[2\]: must be an integer"):
        v.check_int_list("x", [1, 2, "3"], 5)


def test_large_values_are_shown_short() -> None:
    for value in ("x" * 10**6, [0] * 10**6, 10**500, {i: i for i in range(1000)}):
        assert len(v.shown(value)) < 80


@given(st.text())
def test_valid_text_passes(text: str) -> None:
    v.check_unicode("x", text)


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_lone_surrogates_do_not_pass(text: str) -> None:
    with pytest.raises(ValidationError, match="surrogate"):
        v.check_unicode("x", text)
