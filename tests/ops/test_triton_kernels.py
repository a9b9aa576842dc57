"""The Triton kernels: `triton_*cases.py` in a process of its own, and which device gets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tercet import ops
from tercet.ops import rotary
from tercet.ops.attention import paged_attention
from tercet.ops.triton_support import on_cuda

CASES = sorted(map(str, Path(__file__).parent.glob("triton_*cases.py")))
KERNELS = {
    "add_rms_norm",
    "add_rms_norm_gated_linear",
    "add_rms_norm_linear",
    "gated_linear",
    "gelu_tanh_and_mul",
    "linear",
    "logsumexp_and_rank",
    "paged_attention",
    "prepare_step",
    "rms_norm",
    "rope_and_write_kv",
    "sample_rows",
    "silu_and_mul",
}


def run_cases(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *CASES]
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "TRITON_INTERPRET"))
    }
    done = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
    assert " passed" in done.stdout


@pytest.mark.timeout(600)
def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    run_cases({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_kernels_on_the_gpu() -> None:
    run_cases({})


def test_gpus_get_kernels_and_cpus_the_reference() -> None:
    pytest.importorskip("triton")
    named = ops.operations()
    assert {name for name, implementations in named.items() if "triton" in implementations} == KERNELS
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert on_cuda(cuda, dtype) and not on_cuda(cpu, dtype)
        assert paged_attention.select(cuda, dtype) is not paged_attention.select(cpu, dtype)
    assert not on_cuda(cuda, torch.float64)
    assert rotary.apply_rotary.implementations == ("reference",)


def test_triton_is_not_imported_on_a_cpu() -> None:
    check = (
        "import sys, torch; from tercet import ops; import tercet.worker_proc.model_runner; "
        "x = torch.ones(2, 8); ops.rms_norm(x, x[0], 1e-6); ops.silu_and_mul(x); "
        "sys.exit('tercet.ops.triton_rows' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
