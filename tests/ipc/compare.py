"""Equality of messages, arrays included: equal dtype, shape and bits, so that a NaN equals itself."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np

from tercet.ipc.codec import as_array


def same(a: Any, b: Any) -> bool:
    """Whether two values of messages are equal. Arrays of any kind compare as what they become on the wire."""
    if _is_array(a) and _is_array(b):
        left, right = as_array(a), as_array(b)
        bits = np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
        return left.dtype == right.dtype and left.shape == right.shape and bits
    if _is_array(a) or _is_array(b):
        return False
    if isinstance(a, msgspec.Struct):
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in a.__struct_fields__)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    return bool(a == b)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | memoryview) or type(value).__module__ == "torch"
