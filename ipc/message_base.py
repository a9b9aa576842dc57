"""What every message of the protocol is made of."""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import numpy as np

Column: TypeAlias = np.ndarray
"""A numpy array; the comment beside each field gives dtype and shape."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Base of every message."""


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of every struct that travels inside a message."""
