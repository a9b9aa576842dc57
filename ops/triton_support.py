"""Where Triton kernels run, and what their launchers share. Importing this does not import Triton.

Kernel bodies are in `kernels_*.py`, their launchers in `triton_*.py`; both are imported at the first call on a
GPU, so a process that works on a CPU never loads Triton.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

TRITON = "triton"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROCESSORS_ELSEWHERE = 4  # the interpreter's: enough to make it split


def on_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels serve tensors of this device and dtype."""
    return device.type == "cuda" and dtype in _DTYPES and _is_installed()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return _PROCESSORS_ELSEWHERE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n (n >= 1)."""
    return 1 << (n - 1).bit_length()
