"""Hypothesis strategies for messages, built from the declared types: a new field or message needs nothing here."""

from __future__ import annotations

import enum
import math
import random
from functools import cache
from typing import Any

import msgspec
import numpy as np
from hypothesis import strategies as st

from tercet.ipc.codec import DTYPES, MAX_DIMS
from tercet.ipc.schema import INBOXES

MAX_ELEMENTS = 64

integers = st.integers(-(2**63), 2**64 - 1)
floats = st.floats(allow_nan=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)  # MessagePack strings are UTF-8


def random_array(seed: int) -> np.ndarray:
    """An array of any dtype, shape and bits, contiguous or a strided, reversed or transposed view.

    Drawn from one number: Hypothesis takes far longer over many small draws than the codec over the array.
    """
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    shape: tuple[int, ...] = ()
    for _ in range(rng.randrange(MAX_DIMS + 1)):
        room = MAX_ELEMENTS // max(1, math.prod(shape))
        shape = (*shape, rng.choice([size for size in (0, 1, 1, 2, 3, 5, 40) if size <= room]))
    wide = tuple(2 * size for size in shape)
    bits = rng.randbytes(math.prod(wide) * dtype.itemsize)
    data = np.frombuffer(bits, np.uint8) % 2 == 1 if dtype == np.bool_ else np.frombuffer(bits, dtype)
    whole = data.reshape(wide)
    part = whole[tuple(slice(None, size) for size in shape)]
    views = [
        part.copy(),
        whole[tuple(slice(None, None, 2) for _ in shape)],
        part[tuple(slice(None, None, -1) for _ in shape)],
        part.T,
    ]
    return np.asarray(rng.choice(views))


def arrays() -> st.SearchStrategy[np.ndarray]:
    """Arrays as `random_array` makes them."""
    return st.integers(0, 2**32).map(random_array)


def values(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Any value of a declared type."""
    match kind:
        case msgspec.inspect.IntType():
            return integers
        case msgspec.inspect.FloatType():
            return floats
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.StrType():
            return texts
        case msgspec.inspect.BytesType():
            return st.binary(max_size=40)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.EnumType(cls=cls):
            assert issubclass(cls, enum.Enum)
            return st.sampled_from(cls)
        case msgspec.inspect.ListType(item_type=item):
            return st.lists(values(item), max_size=3)
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=3)
        case msgspec.inspect.UnionType(types=types):
            return st.one_of([values(member) for member in types])
        case msgspec.inspect.CustomType(cls=cls) if cls is np.ndarray:
            return arrays()
        case msgspec.inspect.StructType(cls=cls):
            return structs(cls)
        case _:
            raise NotImplementedError(f"no strategy for {kind}")


@cache
def structs(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any instance of a struct. Fields with defaults are sometimes left to them."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    required = {field.name: values(field.type) for field in info.fields if field.required}
    optional = {field.name: values(field.type) for field in info.fields if not field.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda fields: cls(**fields))


MESSAGES = {kind: inbox for inbox in INBOXES.values() for kind in inbox.__args__}
"""Every message type, with one of the inboxes that take it."""


def messages() -> st.SearchStrategy[Any]:
    """Any message of any inbox, with arbitrary contents."""
    return st.one_of([structs(kind) for kind in MESSAGES])
