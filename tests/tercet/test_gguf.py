"""The GGUF reader against the public writer and reader, and against files that are not what they say."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tercet.errors import UnsupportedModelError
from tercet.gguf import BLOCK_SIZES, GGMLType, GGUFError, GGUFFile

U64_MAX = 2**64 - 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file with a value of every kind."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.uint", 7)
    writer.add_int64("a.negative", -(2**40))
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "grüße ▁")
    writer.add_array("a.strings", ["", "ab", "Ġthe", "🦙"])
    writer.add_array("a.ints", [3, -1, 2])
    writer.add_array("a.floats", [0.5, -2.0])
    writer.add_array("a.bools", [True, False])
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("f16", np.arange(5, dtype=np.float16))
    writer.add_tensor("q8", np.zeros((2, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_those_written(file: Path) -> None:
    opened = GGUFFile(file)
    meta = opened.metadata
    assert meta["general.architecture"] == "llama"
    assert (meta["a.uint"], meta["a.negative"], meta["a.float"], meta["a.bool"]) == (7, -(2**40), 0.5, True)
    assert meta["a.string"] == "grüße ▁"
    assert meta["a.strings"] == ["", "ab", "Ġthe", "🦙"]
    for key, values in (("a.ints", [3, -1, 2]), ("a.floats", [0.5, -2.0]), ("a.bools", [True, False])):
        array = meta[key]
        assert isinstance(array, np.ndarray)
        assert array.tolist() == values
    assert list(opened.tensors) == ["f32", "f16", "q8"]
    matrix = opened.tensors["f32"]
    assert (matrix.shape, matrix.type, matrix.num_elements, matrix.nbytes) == ((2, 3), GGMLType.F32, 6, 24)
    assert matrix.data.view("<f4").tolist() == [0, 1, 2, 3, 4, 5]
    assert opened.tensors["f16"].data.view("<f2").tolist() == [0, 1, 2, 3, 4]
    assert opened.tensors["q8"].shape == (2, 64)
    assert not matrix.data.flags.writeable


def test_types_and_block_sizes_are_those_of_ggml() -> None:
    assert BLOCK_SIZES.keys() == set(GGMLType)
    for kind, sizes in BLOCK_SIZES.items():
        public = gguf.GGMLQuantizationType(int(kind))
        assert public.name == kind.name
        assert gguf.GGML_QUANT_SIZES[public] == sizes


def header(num_tensors: int = 0, num_metadata: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_metadata)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor_info(
    name: bytes = b"x",
    dims: tuple[int, ...] = (32,),
    kind: int = 0,
    offset: int = 0,
    num_dims: int | None = None,
) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


NESTED = struct.pack("<IQ", 9, 1) * 40
MALFORMED = {
    "empty": b"",
    "three bytes": b"GGU",
    "other magic": header(magic=b"GGML"),
    "version 1": header(version=1),
    "version 99": header(version=99),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "header cut": header()[:-1],
    "too many tensors": header(num_tensors=U64_MAX),
    "too much metadata": header(num_metadata=U64_MAX),
    "missing metadata": header(num_metadata=1) + bytes(12),
    "key beyond the end": header(num_metadata=1) + struct.pack("<Q", 1 << 60) + bytes(20),
    "key not utf-8": header(num_metadata=1) + text(b"\xff\xfe") + struct.pack("<IB", 0, 1),
    "unknown value type": header(num_metadata=1) + text(b"k") + struct.pack("<IQ", 77, 0),
    "value cut": header(num_metadata=1) + text(b"key") + struct.pack("<I", 10) + bytes(3),
    "long array": header(num_metadata=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62) + bytes(8),
    "many strings": header(num_metadata=1) + text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 62) + bytes(8),
    "strings cut": header(num_metadata=1) + text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 0),
    "string of an array beyond the end": header(num_metadata=1)
    + text(b"k")
    + struct.pack("<IIQQ", 9, 8, 1, 1 << 50),
    "array of bad strings": header(num_metadata=1)
    + text(b"k")
    + struct.pack("<IIQ", 9, 8, 1)
    + text(b"\xff"),
    "unknown array type": header(num_metadata=1) + text(b"k") + struct.pack("<IIQ", 9, 66, 1),
    "many arrays": header(num_metadata=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1 << 62),
    "arrays too deep": header(num_metadata=1) + text(b"k") + struct.pack("<I", 9) + NESTED,
    "key twice": header(num_metadata=2) + (text(b"k") + struct.pack("<IB", 0, 1)) * 2,
    "five dimensions": header(num_tensors=1) + tensor_info(dims=(1,) * 5),
    "very many dimensions": header(num_tensors=1) + tensor_info(num_dims=1 << 31),
    "unknown tensor type": header(num_tensors=1) + tensor_info(kind=31),
    "rows that are no blocks": header(num_tensors=1) + tensor_info(dims=(33,), kind=2),
    "tensor beyond the end": header(num_tensors=1) + tensor_info() + bytes(64),
    "huge tensor": header(num_tensors=1) + tensor_info(dims=(U64_MAX, U64_MAX)) + bytes(64),
    "offset beyond the end": header(num_tensors=1) + tensor_info(offset=1 << 63) + bytes(64),
    "offset not aligned": header(num_tensors=1) + tensor_info(dims=(1,), offset=4) + bytes(64),
    "tensor twice": header(num_tensors=2) + tensor_info(dims=(1,)) * 2 + bytes(64),
    "alignment no power of two": header(num_metadata=1)
    + text(b"general.alignment")
    + struct.pack("<II", 4, 24),
    "alignment zero": header(num_metadata=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
    "alignment no number": header(num_metadata=1)
    + text(b"general.alignment")
    + struct.pack("<I", 8)
    + text(b"x"),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_file_is_a_typed_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=r"bad\.gguf: "):
        GGUFFile(path)
    assert issubclass(GGUFError, UnsupportedModelError)


def test_every_truncation_is_noticed(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    last = GGUFFile(file).tensors["q8"]
    end = GGUFFile(file).header_size + 64 + last.nbytes  # f32 and f16 take one aligned slot each
    path = tmp_path / "cut.gguf"
    for size in range(0, end, 7):
        path.write_bytes(content[:size])
        with pytest.raises(GGUFError):
            GGUFFile(path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_file_is_read_or_refused(data: st.DataObject, file: Path) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + 1] = data.draw(st.binary(max_size=9))
    path = file.with_suffix(".mutated")
    path.write_bytes(content)
    try:
        opened = GGUFFile(path)
    except GGUFError:
        return
    assert all(tensor.data.sum() >= 0 for tensor in opened.tensors.values())
