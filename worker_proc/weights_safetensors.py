"""Checkpoints in safetensors files, one or several with an index, read through memory maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tercet.worker_proc.weights_source import FLOAT_TYPES, NamedWeight, WeightsError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def iterate_safetensors(directory: Path) -> Iterator[NamedWeight]:
    """Every tensor of a checkpoint directory.

    Raises:
        WeightsError: no safetensors files, a file of the index missing, a corrupt file, or, from `read`, a
            tensor that does not hold floats.
    """
    for file in checkpoint_files(directory):
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
                    yield NamedWeight(name, _nbytes(handle, name), partial(_read, handle, name, file))
        except SafetensorError as error:
            raise WeightsError(f"{file}: not a valid safetensors file ({error}); fetch it again") from None


def checkpoint_files(directory: Path) -> list[Path]:
    """The files that the index names, or the single file, or all there are.

    Raises:
        WeightsError: none, or one of the index is missing.
    """
    if (index := directory / INDEX_FILE).is_file():
        return _indexed_files(index)
    if (single := directory / SINGLE_FILE).is_file():
        return [single]
    # `consolidated` files are a second copy of the weights under other names
    files = sorted(file for file in directory.glob("*.safetensors") if "consolidated" not in file.name)
    if not files:
        other = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)]
        hint = f" ({other[0]} is a pickle, which is not read: convert it to safetensors)" if other else ""
        raise WeightsError(f"{directory}: holds no .safetensors file{hint}")
    return files


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index}: not a valid index ({error!r}); fetch it again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise WeightsError(f"{index}: {name!r} is not a plain file name")
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index.parent / name}: missing, though the index names it; fetch it again")
    return [index.parent / name for name in names]


def _nbytes(handle: Any, name: str) -> int:
    view = handle.get_slice(name)
    digits = "".join(filter(str.isdigit, view.get_dtype().split("_")[0]))  # F32, BF16, F8_E4M3, BOOL
    shape: list[int] = view.get_shape()
    return math.prod(shape) * max(int(digits or 8) // 8, 1)


def _read(handle: Any, name: str, file: Path) -> Tensor:
    tensor: Tensor = handle.get_tensor(name)
    if tensor.dtype not in FLOAT_TYPES:
        raise WeightsError(
            f"{file}: tensor {name!r} is {tensor.dtype}; quantized checkpoints are not supported, "
            "use one in float32, float16 or bfloat16"
        )
    return tensor
