"""Reader of GGUF files: metadata and raw tensor bytes, over one memory map.

Owns the container format and nothing else: what a metadata key means is `model_source`'s business,
turning quantised blocks into numbers is the worker's. Files are untrusted input: every count, length and
offset is checked against the file before it is used, so that a corrupt file raises `GGUFError` and never
reads outside the map or allocates more than the file could hold.

Source: the GGUF specification, ggml `docs/gguf.md` (versions 2 and 3, little endian).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tercet.errors import UnsupportedModelError

MAGIC = b"GGUF"
SUPPORTED_VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4

UInt8Array = npt.NDArray[np.uint8]


class GGUFError(UnsupportedModelError, ValueError):
    """The file is not a GGUF file that can be read; the message names the place and the fix."""


class GGMLType(IntEnum):
    """Storage types of tensors in files, numbered as in ggml.h."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39


# type -> (elements per block, bytes per block)
BLOCK_SIZES: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.F64: (1, 8),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
}

_VALUE_BOOL, _VALUE_STRING, _VALUE_ARRAY = 7, 8, 9
# value type -> (struct format, numpy dtype)
_SCALARS: dict[int, tuple[struct.Struct, np.dtype[np.generic]]] = {
    0: (struct.Struct("<B"), np.dtype("<u1")),
    1: (struct.Struct("<b"), np.dtype("<i1")),
    2: (struct.Struct("<H"), np.dtype("<u2")),
    3: (struct.Struct("<h"), np.dtype("<i2")),
    4: (struct.Struct("<I"), np.dtype("<u4")),
    5: (struct.Struct("<i"), np.dtype("<i4")),
    6: (struct.Struct("<f"), np.dtype("<f4")),
    _VALUE_BOOL: (struct.Struct("<?"), np.dtype("?")),
    10: (struct.Struct("<Q"), np.dtype("<u8")),
    11: (struct.Struct("<q"), np.dtype("<i8")),
    12: (struct.Struct("<d"), np.dtype("<f8")),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# Smallest possible encodings, which bound the counts that a header may claim.
_MIN_METADATA_BYTES = 8 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 4 + 8


@dataclass(frozen=True, slots=True, eq=False)
class GGUFTensor:
    """One tensor as it lies in the file.

    Attributes:
        name: as in the file, e.g. `blk.0.attn_q.weight`.
        shape: outermost dimension first (numpy and torch order; the file stores the reverse).
        type: ggml storage type.
        data: flat uint8 view of the memory map, `nbytes` long; read-only.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    data: UInt8Array

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)


class GGUFFile:
    """An open GGUF file.

    Attributes:
        path: the file.
        version: container version.
        metadata: key -> bool, int, float, str, list of str, or numpy array (arrays of numbers and bools).
        tensors: name -> GGUFTensor, in file order; no tensor byte is touched until its data is read.
        header_size: bytes before the tensor data.

    Raises:
        GGUFError: not a GGUF file, an unsupported version or tensor type, or corrupt.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        buffer = _map_file(self.path)
        cursor = _Cursor(buffer, self.path)
        num_tensors, num_metadata = _read_preamble(cursor)
        self.version = cursor.version
        self.metadata: dict[str, object] = _read_metadata(cursor, num_metadata)
        infos = _read_tensor_infos(cursor, num_tensors)
        alignment = _alignment(self.metadata, cursor)
        self.header_size = -(-cursor.position // alignment) * alignment
        self.tensors = _map_tensors(infos, buffer, self.header_size, alignment, cursor)


class _Cursor:
    """A bounds-checked reading position in the map."""

    def __init__(self, buffer: memoryview, path: Path) -> None:
        self.buffer = buffer
        self.path = path
        self.size = len(buffer)
        self.position = 0
        self.version = 0

    def fail(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path}: {problem} (at byte {self.position}); fetch or convert the file again")

    def need(self, count: int) -> None:
        if count > self.size - self.position:
            raise self.fail(f"truncated or corrupt: {count} bytes wanted, {self.size - self.position} left")

    def u32(self) -> int:
        self.need(4)
        value: int = _U32.unpack_from(self.buffer, self.position)[0]
        self.position += 4
        return value

    def u64(self) -> int:
        self.need(8)
        value: int = _U64.unpack_from(self.buffer, self.position)[0]
        self.position += 8
        return value

    def take(self, count: int) -> memoryview:
        self.need(count)
        view = self.buffer[self.position : self.position + count]
        self.position += count
        return view

    def string(self) -> str:
        length = self.u64()
        raw = bytes(self.take(length))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8 ({error.reason})") from None

    def strings(self, count: int) -> list[str]:
        """Read `count` strings. A tight loop: vocabularies have some 10^5 of them."""
        if count > (self.size - self.position) // 8:
            raise self.fail(f"an array claims {count} strings, more than the file can hold")
        buffer, position, size, unpack = self.buffer, self.position, self.size, _U64.unpack_from
        values: list[str] = []
        try:
            for _ in range(count):
                (length,) = unpack(buffer, position)
                start, position = position + 8, position + 8 + length
                if position > size:
                    raise self.fail("truncated or corrupt: a string ends beyond the file")
                values.append(str(buffer[start:position], "utf-8"))
        except struct.error:
            raise self.fail("truncated or corrupt: an array of strings ends beyond the file") from None
        except UnicodeDecodeError as error:
            raise self.fail(f"a string is not UTF-8 ({error.reason})") from None
        self.position = position
        return values


def _map_file(path: Path) -> memoryview:
    with open(path, "rb") as file:
        if file.seek(0, 2) < len(MAGIC):
            raise GGUFError(f"{path}: not a GGUF file (shorter than its magic)")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    magic = bytes(cursor.take(4))
    if magic != MAGIC:
        raise GGUFError(f"{cursor.path}: not a GGUF file (magic {magic!r}, expected {MAGIC!r})")
    cursor.version = cursor.u32()
    if cursor.version not in SUPPORTED_VERSIONS:
        swapped = int.from_bytes(cursor.version.to_bytes(4, "little"), "big")
        why = "is big endian" if swapped in SUPPORTED_VERSIONS else f"has version {cursor.version}"
        raise GGUFError(f"{cursor.path}: the file {why}; convert it to little-endian GGUF version 3")
    num_tensors, num_metadata = cursor.u64(), cursor.u64()
    left = cursor.size - cursor.position
    if num_tensors > left // _MIN_TENSOR_INFO_BYTES or num_metadata > left // _MIN_METADATA_BYTES:
        raise cursor.fail(f"the header claims {num_tensors} tensors and {num_metadata} metadata entries")
    return num_tensors, num_metadata


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for _ in range(count):
        key = cursor.string()
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = _read_value(cursor, cursor.u32(), depth=0)
    return metadata


def _read_value(cursor: _Cursor, value_type: int, depth: int) -> object:
    if value_type == _VALUE_STRING:
        return cursor.string()
    if value_type == _VALUE_ARRAY:
        return _read_array(cursor, depth + 1)
    if value_type not in _SCALARS:
        raise cursor.fail(f"unknown metadata value type {value_type}")
    scalar, _ = _SCALARS[value_type]
    value: object = scalar.unpack(cursor.take(scalar.size))[0]
    return value


def _read_array(cursor: _Cursor, depth: int) -> object:
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.fail(f"metadata arrays nested deeper than {MAX_ARRAY_DEPTH}")
    item_type, count = cursor.u32(), cursor.u64()
    if item_type == _VALUE_STRING:
        return cursor.strings(count)
    if item_type == _VALUE_ARRAY:
        if count > (cursor.size - cursor.position) // 12:
            raise cursor.fail(f"an array claims {count} arrays, more than the file can hold")
        return [_read_array(cursor, depth + 1) for _ in range(count)]
    if item_type not in _SCALARS:
        raise cursor.fail(f"unknown metadata array type {item_type}")
    dtype = _SCALARS[item_type][1]
    raw = cursor.take(count * dtype.itemsize)
    if item_type == _VALUE_BOOL:  # a byte other than 0 and 1 must not become an invalid numpy bool
        return np.frombuffer(raw, dtype=np.uint8) != 0
    return np.frombuffer(raw, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


def _read_tensor_infos(cursor: _Cursor, count: int) -> list[_TensorInfo]:
    return [_read_tensor_info(cursor) for _ in range(count)]


def _read_tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.string()
    num_dims = cursor.u32()
    if num_dims > MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} claims {num_dims} dimensions, at most {MAX_DIMS} exist")
    fastest_first = [cursor.u64() for _ in range(num_dims)]
    type_number, offset = cursor.u32(), cursor.u64()
    try:
        ggml_type = GGMLType(type_number)
    except ValueError:
        raise cursor.fail(f"tensor {name!r} has ggml type {type_number}, which is not supported") from None
    block_elements, block_bytes = BLOCK_SIZES[ggml_type]
    row = fastest_first[0] if fastest_first else 1
    if row % block_elements:
        raise cursor.fail(f"tensor {name!r}: rows of {row} do not divide into {ggml_type.name} blocks")
    nbytes = math.prod(fastest_first) // block_elements * block_bytes
    return _TensorInfo(name, tuple(reversed(fastest_first)), ggml_type, offset, nbytes)


def _alignment(metadata: dict[str, object], cursor: _Cursor) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, expected a power of two")
    return alignment


def _map_tensors(
    infos: list[_TensorInfo], buffer: memoryview, start: int, alignment: int, cursor: _Cursor
) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise cursor.fail(f"tensor {info.name!r} appears twice")
        if info.offset % alignment:
            raise cursor.fail(f"tensor {info.name!r}: offset {info.offset} is not a multiple of {alignment}")
        begin = start + info.offset
        if begin + info.nbytes > cursor.size:
            missing = begin + info.nbytes - cursor.size
            raise cursor.fail(f"tensor {info.name!r} ends {missing} bytes beyond the file: truncated")
        data = np.frombuffer(buffer[begin : begin + info.nbytes], dtype=np.uint8)
        tensors[info.name] = GGUFTensor(info.name, info.shape, info.type, data)
    return tensors
