"""MessagePack with arrays out of band: messages to frames and back, without copying large buffers.

An array travels as an extension value. Up to `INLINE_BYTES` its data lies inside the MessagePack frame
(extension INLINE); a larger one becomes a frame of its own (extension FRAME), which is handed to the socket
as a view of the sender's memory and decoded as a view of the received frame.

    header  = u8 dtype code, u8 number of dimensions, u32 × dimensions (little endian)
    INLINE  = header, data
    FRAME   = header, u16 index of the frame (1 is the first after the MessagePack frame)

Decoding trusts nothing: types are checked by msgspec against the inbox's union, array headers against the
bytes that came, and frame counts and sizes against caps. Anything wrong is a `WireError`.

Arrays arrive read-only. bfloat16, which numpy lacks, arrives as its bits (uint16).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar, cast

import msgspec
import numpy as np

from tercet.ipc.errors import WireError

INLINE_BYTES: Final = 16 * 1024
"""Largest array kept inside the MessagePack frame.

Round trip of an array between two processes, inline or as a frame (`benchmarks/bench_channel.py`, medians in µs
on 2 cores): 4 KB 315 or 401, 16 KB 384 or 451, 32 KB 411 or 336, 64 KB 550 or 393, 256 KB 1122 or 684.
"""

MAX_FRAMES: Final = 256
MAX_MESSAGE_BYTES: Final = 1 << 30  # of all frames together
MAX_HEAD_BYTES: Final = 1 << 27  # of the MessagePack frame: its objects are larger than their bytes
MAX_DIMS: Final = 8

INLINE: Final = 1
FRAME: Final = 2

_DTYPE_NAMES: Final = ("bool", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
DTYPES: Final = tuple(np.dtype(name) for name in _DTYPE_NAMES)
_CODE_OF: Final = {dtype: code for code, dtype in enumerate(DTYPES)}
_INDEX = struct.Struct("<H")
_HEADERS = tuple(struct.Struct(f"<BB{n}I") for n in range(MAX_DIMS + 1))

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Encoder:
    """Encodes messages; one per sending end, not to be shared between threads."""

    def __init__(self, inline_bytes: int = INLINE_BYTES) -> None:
        self._inline_bytes = inline_bytes
        self._frames: list[Buffer] = []
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._encode_array)
        self._buffer = bytearray(4096)

    def encode(self, message: msgspec.Struct) -> list[Buffer]:
        """Frames of a message: the MessagePack frame, then one view per large array.

        The first frame is this encoder's own buffer, valid until the next call: a socket must copy it.

        Raises:
            NotImplementedError: a value is of a type or dtype that crosses no wire.
            WireError: the message is larger than any receiver takes.
        """
        frames: list[Buffer] = []
        self._frames = frames
        self._encoder.encode_into(message, self._buffer)
        if len(self._buffer) > MAX_HEAD_BYTES:
            raise WireError(f"a {type(message).__name__} of {len(self._buffer)} bytes does not cross a wire")
        return [self._buffer, *frames]

    def encode_bytes(self, message: msgspec.Struct) -> list[Buffer]:
        """As `encode`, but the first frame is bytes of its own."""
        frames = self.encode(message)
        frames[0] = bytes(frames[0])
        return frames

    def _encode_array(self, value: Any) -> msgspec.msgpack.Ext:
        array = as_array(value)
        header = _header(array)
        # A message of very many large arrays keeps the last of them inline: receivers cap the frames.
        if array.nbytes <= self._inline_bytes or len(self._frames) == MAX_FRAMES - 1:
            return msgspec.msgpack.Ext(INLINE, header + array.tobytes())
        if not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)
        self._frames.append(array.data.cast("B"))
        return msgspec.msgpack.Ext(FRAME, header + _INDEX.pack(len(self._frames)))


class Decoder(Generic[T]):
    """Decodes the messages of one inbox; one per receiving end, not to be shared between threads."""

    def __init__(self, inbox: Any) -> None:
        """Args: inbox: the union of message types that this end accepts."""
        self._frames: Sequence[Buffer] = ()
        self._used = 0
        self._decoder = msgspec.msgpack.Decoder(inbox, ext_hook=self._decode_array)

    def decode(self, frames: Sequence[Buffer]) -> T:
        """The message in these frames. Arrays are read-only views of them.

        Raises:
            WireError: the frames are not one message of this inbox.
        """
        if not 0 < len(frames) <= MAX_FRAMES:
            raise WireError(f"a message has 1 to {MAX_FRAMES} frames; got {len(frames)}")
        if len(frames[0]) > MAX_HEAD_BYTES or sum(map(len, frames)) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {sum(map(len, frames))} bytes is too large")
        self._frames, self._used = frames, 0
        try:
            message = cast(T, self._decoder.decode(frames[0]))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise WireError(f"not a message of this inbox: {error}") from None
        finally:
            self._frames = ()
        if self._used != len(frames) - 1:
            raise WireError(f"{len(frames) - 1} buffer frames came, {self._used} are named")
        return message

    def _decode_array(self, code: int, data: memoryview) -> np.ndarray:
        if len(data) < 2:
            raise WireError("array header cut short")
        dtype_code, num_dims = data[0], data[1]
        if dtype_code >= len(DTYPES) or num_dims > MAX_DIMS:
            raise WireError(f"array of unknown dtype {dtype_code} or {num_dims} dimensions")
        header = _HEADERS[num_dims]
        if len(data) < header.size:
            raise WireError("array header cut short")
        shape = header.unpack_from(data)[2:]
        rest = data[header.size :]
        body: Buffer = rest
        if code == FRAME:
            body = self._take_frame(rest)
        elif code != INLINE:
            raise WireError(f"unknown extension {code}")
        return _array_over(body, DTYPES[dtype_code], shape)

    def _take_frame(self, reference: memoryview) -> Buffer:
        if len(reference) != _INDEX.size:
            raise WireError("frame reference of the wrong size")
        index: int = _INDEX.unpack(reference)[0]
        # Frames are named in order, each once: what the encoder writes, and no aliasing for a hostile peer.
        if index != self._used + 1 or index >= len(self._frames):
            raise WireError(f"frame {index} is named out of order or did not come")
        self._used = index
        return self._frames[index]


def as_array(value: Any) -> np.ndarray:
    """A numpy view of an array-like: numpy array, memoryview, or CPU torch tensor (bfloat16 as its bits).

    Arrays and tensors may be put into a message as they are. A contiguous memoryview, as its bytes, comes
    through here first: msgspec would write a bare one as MessagePack bytes, a copy.

    Raises:
        NotImplementedError: the value is nothing that crosses a wire (msgspec's way of saying so).
    """
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, memoryview):
        array = np.frombuffer(value, np.uint8)
    elif type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "numpy"):
        tensor = value.detach()
        if str(tensor.dtype) == "torch.bfloat16":
            tensor = tensor.view(sys.modules["torch"].uint16)  # loaded, since the value is one of its tensors
        array = tensor.numpy()
    else:
        raise NotImplementedError(f"{type(value).__name__} does not cross a wire")
    if array.dtype not in _CODE_OF:
        raise NotImplementedError(f"arrays of dtype {array.dtype} do not cross a wire")
    return array


def _header(array: np.ndarray) -> bytes:
    if array.ndim > MAX_DIMS:
        raise NotImplementedError(f"an array of {array.ndim} dimensions does not cross a wire")
    return _HEADERS[array.ndim].pack(_CODE_OF[array.dtype], array.ndim, *array.shape)


def _array_over(body: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    count = 1
    for size in shape:
        count *= size  # Python integers: no overflow to fool the check below
    if count * dtype.itemsize != len(body):
        raise WireError(f"array of shape {shape} and {dtype} does not fit {len(body)} bytes")
    array = np.frombuffer(body, dtype)
    if array.flags.writeable:
        array.flags.writeable = False
    return array.reshape(shape) if len(shape) != 1 else array
