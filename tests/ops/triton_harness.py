"""What the files of kernel cases share: the device, the dtypes, poison, seeds and tolerances.

TRITON_INTERPRET must be set before Triton is imported, hence a process of its own (`test_triton_kernels.py`).
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# In the interpreter tl.dot of bfloat16 returns rubbish.
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]
# What numpy says of the interpreter's scalars, and of overflow that the kernels mean.
MARKS = [
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
