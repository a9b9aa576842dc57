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
_FIRST_WITH_PROGRAMMATIC_LAUNCH = 9  # compute capability: Hopper
# Linear layers and row kernels of Qwen3-0.6B in a graph on an H100: 18 and 16 % faster of 1 and 4 rows, 9 % slower of
# 16, 2 % of 32.
_MOST_PROGRAMMATIC_ROWS = 8
_programmatic_launch = True
_PROCESSORS_ELSEWHERE = 4  # the interpreter's: enough to make it split


def on_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels serve tensors of this device and dtype."""
    return device.type == "cuda" and dtype in _DTYPES and _is_installed()


def on_any_cuda(device: torch.device, dtype: torch.dtype) -> bool:
    """The same for operations whose first tensor is not of floats."""
    return device.type == "cuda" and _is_installed()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return _PROCESSORS_ELSEWHERE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def set_programmatic_launch(on: bool) -> None:
    """Choose whether kernels that can may start before the one ahead of them in the stream has finished."""
    global _programmatic_launch
    _programmatic_launch = on


def programmatic_launch(device: torch.device, num_rows: int) -> dict[str, bool]:
    """Launch options for programmatic dependent launch; empty where it is off, does not pay or the device lacks it.

    A kernel launched so is also told (PDL). It lets its successor start at once and waits for its predecessor
    before it writes anything or reads what a kernel may have written; weights it may read before, so whoever
    changes weights on the device synchronises before the next step.

    Args:
        num_rows: tokens that the kernel works on. Of many, those kernels that do not take part (cuBLAS) are so
            large a share that it costs more than it hides.
    """
    if num_rows > _MOST_PROGRAMMATIC_ROWS or not _programmatic_launch:
        return {}
    return {"launch_pdl": True} if _has_programmatic_launch(device) else {}


@functools.cache
def _has_programmatic_launch(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device)[0] >= _FIRST_WITH_PROGRAMMATIC_LAUNCH


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n (n >= 1)."""
    return 1 << (n - 1).bit_length()
