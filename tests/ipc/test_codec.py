"""The codec: every message comes back as it was, nothing large is copied, nothing malformed gets through."""

from __future__ import annotations

import random
import struct
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tercet.ipc import codec
from tercet.ipc import messages as m
from tercet.ipc.codec import FRAME, INLINE, INLINE_BYTES, MAX_FRAMES, Buffer, Decoder, Encoder, as_array
from tercet.ipc.errors import WireError
from tests.conftest import FULL
from tests.ipc.compare import same
from tests.ipc.golden_messages import EXAMPLES, inboxes_of, read
from tests.ipc.strategies import MESSAGES, arrays, messages, structs


def round_trip(message: msgspec.Struct, inline_bytes: int = INLINE_BYTES) -> Any:
    frames = Encoder(inline_bytes).encode_bytes(message)
    return Decoder[Any](MESSAGES[type(message)]).decode([memoryview(bytes(frame)) for frame in frames])


# ------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@settings(max_examples=2_000 if FULL else 100)
@given(data=st.data(), inline_bytes=st.sampled_from([0, 16, INLINE_BYTES]))
def test_every_message_comes_back_as_it_was(kind: Any, data: st.DataObject, inline_bytes: int) -> None:
    message = data.draw(structs(kind))
    assert same(round_trip(message, inline_bytes), message)


@settings(max_examples=5_000 if FULL else 200)
@given(array=arrays(), inline_bytes=st.sampled_from([0, INLINE_BYTES]))
def test_arrays_of_every_dtype_shape_and_layout_come_back(array: np.ndarray, inline_bytes: int) -> None:
    back = round_trip(m.Abort(epoch=1, handles=array), inline_bytes).handles
    assert same(back, array)
    assert not back.flags.writeable


@pytest.mark.parametrize("inline_bytes", [0, INLINE_BYTES])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,) * 8])
def test_shapes_at_the_edge(shape: tuple[int, ...], inline_bytes: int) -> None:
    back = round_trip(m.Abort(epoch=1, handles=np.ones(shape, np.float16)), inline_bytes).handles
    assert back.shape == shape and back.dtype == np.float16


@settings(max_examples=30)
@given(message=messages())
def test_one_encoder_serves_one_message_after_another(message: Any) -> None:
    """Its buffer is used again: nothing of a longer message before may stay in a shorter one."""
    encoder = Encoder()
    encoder.encode(EXAMPLES["AddRequest"])
    frames = encoder.encode_bytes(message)
    assert same(Decoder[Any](MESSAGES[type(message)]).decode(frames), message)


def test_torch_tensors_travel_as_arrays() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        assert np.array_equal(round_trip(m.Abort(epoch=1, handles=tensor)).handles, tensor.numpy())
        assert np.array_equal(round_trip(m.Abort(epoch=1, handles=tensor.T)).handles, tensor.numpy().T)


def test_bfloat16_travels_as_its_bits() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.tensor([[1.5, -2.0], [3.0e38, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    back = round_trip(m.Abort(epoch=1, handles=tensor), 0).handles
    assert back.dtype == np.uint16
    assert torch.equal(torch.from_numpy(back.copy()).view(torch.bfloat16), tensor.detach())


def test_memoryviews_travel_as_their_bytes() -> None:
    for data in (b"", b"some bytes", bytearray(100_000), np.arange(30_000).data):
        view = as_array(memoryview(data))
        assert round_trip(m.Abort(epoch=1, handles=view)).handles.tobytes() == bytes(data)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        np.array(["text"]),
        np.array([object()]),
        np.zeros(1, np.complex64),
        np.zeros(1, ">i4"),
    ],
)
def test_what_has_no_place_on_a_wire_is_refused_when_sent(value: Any) -> None:
    with pytest.raises(NotImplementedError, match="cross a wire"):
        Encoder().encode(m.Abort(epoch=1, handles=value))


def test_an_array_of_too_many_dimensions_is_refused_when_sent() -> None:
    with pytest.raises(NotImplementedError, match="9 dimensions"):
        Encoder().encode(m.Abort(epoch=1, handles=np.zeros((1,) * 9)))


# ------------------------------------------------------------------------------------ no copies


def test_a_large_array_leaves_as_a_view_of_the_senders_memory() -> None:
    array = np.arange(INLINE_BYTES, dtype=np.int32)
    frames = Encoder().encode(m.Abort(epoch=1, handles=array))
    assert len(frames) == 2
    assert np.shares_memory(np.frombuffer(frames[1], np.int32), array)


def test_a_large_tensor_and_a_large_memoryview_leave_as_views_too() -> None:
    torch = pytest.importorskip("torch")
    tensor, data = torch.arange(INLINE_BYTES), bytearray(2 * INLINE_BYTES)
    for value, memory in (
        (tensor, tensor.numpy()),
        (as_array(memoryview(data)), np.frombuffer(data, np.uint8)),
    ):
        frames = Encoder().encode(m.Abort(epoch=1, handles=value))
        assert np.shares_memory(np.frombuffer(frames[1], np.uint8), memory)


@pytest.mark.parametrize("num_bytes", [4, INLINE_BYTES, INLINE_BYTES + 4, 1 << 20])
def test_decoded_arrays_are_views_of_the_received_frames(num_bytes: int) -> None:
    frames = Encoder().encode_bytes(m.Abort(epoch=1, handles=np.zeros(num_bytes // 4, np.int32)))
    received = [bytearray(frame) for frame in frames]
    back = Decoder[Any](m.FrontendToCore).decode(received)
    assert len(received) == (2 if num_bytes > INLINE_BYTES else 1)
    assert np.shares_memory(back.handles, np.frombuffer(received[-1], np.uint8))


def test_a_large_message_is_decoded_without_allocating_its_size() -> None:
    frames = Encoder().encode_bytes(m.Abort(epoch=1, handles=np.zeros(1 << 22, np.int32)))
    decoder = Decoder[Any](m.FrontendToCore)
    tracemalloc.start()
    try:
        decoder.decode(frames)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 16


def test_the_first_frame_is_the_encoders_own_buffer_and_used_again() -> None:
    encoder = Encoder()
    first = encoder.encode(m.Shutdown(epoch=1))[0]
    assert encoder.encode(m.Shutdown(epoch=2))[0] is first
    assert isinstance(encoder.encode_bytes(m.Shutdown(epoch=3))[0], bytes)


def test_a_message_of_very_many_large_arrays_stays_within_the_cap_on_frames() -> None:
    """A plan may admit hundreds of long prompts at once, since cached ones cost a token of budget each."""
    admission = EXAMPLES["StepPlan"].admissions[0]  # type: ignore[attr-defined]
    admission = msgspec.structs.replace(admission, token_ids=np.arange(INLINE_BYTES, dtype=np.int32))
    plan = m.StepPlan(epoch=1, step=1, admissions=[admission] * 300)
    frames = Encoder().encode_bytes(plan)
    assert len(frames) == MAX_FRAMES
    assert same(Decoder[Any](m.CoreToWorker).decode(frames), plan)


# ------------------------------------------------------------------------------------ malformed frames


def decodes_or_is_refused(inbox: Any, frames: list[Buffer]) -> bool:
    """Whether frames decode. Any exception but WireError is a hole that a hostile peer could use."""
    try:
        Decoder[Any](inbox).decode(frames)
    except WireError:
        return False
    return True


def mutate(rng: random.Random, frames: list[Buffer]) -> list[Buffer]:
    """Flip, cut, insert, repeat or swap: bytes of a frame, or frames of a message."""
    mutated = [bytearray(frame) for frame in frames]
    _mutate(rng, mutated)
    return list(mutated)


def _mutate(rng: random.Random, frames: list[bytearray]) -> None:
    for _ in range(rng.randint(1, 4)):
        index = rng.randrange(len(frames)) if frames else 0
        what = rng.randrange(8)
        if not frames or what == 0:
            frames.insert(index, bytearray(rng.randbytes(rng.choice([0, 1, 50]))))
        elif what == 1:
            del frames[index]
        elif what == 2:
            rng.shuffle(frames)
        elif what == 3:
            del frames[index][rng.randrange(len(frames[index]) + 1) :]
        elif frames[index]:
            at = rng.randrange(len(frames[index]))
            if what == 4:
                frames[index][at:at] = rng.randbytes(rng.randint(1, 4))
            elif what == 5:
                del frames[index][at : at + rng.randint(1, 4)]
            else:
                byte = rng.choice([rng.randrange(256), 0xFF, 0xC1, 0xDD, 0xDB, 0xC9, 0xDF, 0x91])
                frames[index][at] = byte


@pytest.mark.parametrize("name", EXAMPLES)
def test_mutated_frames_are_refused_or_a_message_but_never_an_accident(name: str) -> None:
    rng = random.Random(name)
    golden, inbox = read(name), inboxes_of(EXAMPLES[name])[0]
    num_refused = 0
    for _ in range(20_000 if FULL else 600):
        num_refused += not decodes_or_is_refused(inbox, mutate(rng, golden))
    assert num_refused > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_frames_cut_short_anywhere_are_refused(name: str) -> None:
    golden, inbox = read(name), inboxes_of(EXAMPLES[name])[0]
    for size in range(len(golden[0])):
        assert not decodes_or_is_refused(inbox, [golden[0][:size], *golden[1:]]), f"cut at {size}"
    for index in range(1, len(golden)):
        for size in range(len(golden[index])):
            cut = [*golden[:index], golden[index][:size], *golden[index + 1 :]]
            assert not decodes_or_is_refused(inbox, cut), f"frame {index} cut at {size}"


@settings(max_examples=2_000 if FULL else 100)
@given(frames=st.lists(st.binary(max_size=60), max_size=4), inbox=st.sampled_from(list(MESSAGES.values())))
def test_random_bytes_are_refused(frames: list[Buffer], inbox: Any) -> None:
    decodes_or_is_refused(inbox, frames)


def message_with(extension: bytes, code: int = INLINE) -> bytes:
    """An Abort whose handles are an extension with this content."""
    return msgspec.msgpack.encode(["Abort", 1, msgspec.msgpack.Ext(code, extension)])


def header(dtype: int, *shape: int, dims: int | None = None) -> bytes:
    return struct.pack("<BB", dtype, len(shape) if dims is None else dims) + struct.pack(
        f"<{len(shape)}I", *shape
    )


HUGE = 2**32 - 1
BAD_ARRAYS: dict[str, tuple[bytes, list[Buffer]]] = {
    "no header": (message_with(b""), []),
    "header of a byte": (message_with(b"\x05"), []),
    "unknown dtype": (message_with(header(99, 1) + b"\0"), []),
    "too many dimensions": (message_with(header(1, dims=9) + bytes(36)), []),
    "dimensions cut short": (message_with(header(1, 4, dims=2)), []),
    "too few bytes": (message_with(header(6, 4) + bytes(15)), []),
    "too many bytes": (message_with(header(6, 4) + bytes(17)), []),
    "huge dimension": (message_with(header(6, HUGE) + bytes(4)), []),
    "product that wraps 64 bits": (message_with(header(1, 2**31, 2**31, 4) + b""), []),
    "product that wraps to the bytes there": (message_with(header(1, 2**31, 2**31, 4, 1) + bytes(1)), []),
    "huge but empty": (message_with(header(8, HUGE, HUGE, HUGE, HUGE, 0, HUGE)), []),
    "unknown extension": (message_with(header(1, 1) + b"\0", code=7), []),
    "negative extension": (message_with(header(1, 1) + b"\0", code=-1), []),
    "frame that did not come": (message_with(header(1, 4) + b"\x01\0", FRAME), []),
    "frame 0": (message_with(header(1, 4) + b"\0\0", FRAME), [bytes(4)]),
    "frame out of order": (message_with(header(1, 4) + b"\x02\0", FRAME), [bytes(4), bytes(4)]),
    "frame index past the last": (message_with(header(1, 4) + b"\xff\xff", FRAME), [bytes(4)]),
    "frame reference cut short": (message_with(header(1, 4) + b"\x01", FRAME), [bytes(4)]),
    "frame reference too long": (message_with(header(1, 4) + b"\x01\0\0", FRAME), [bytes(4)]),
    "frame of the wrong size": (message_with(header(6, 4) + b"\x01\0", FRAME), [bytes(15)]),
    "frame that nobody names": (message_with(header(1, 1) + b"\0"), [b"extra"]),
    "bytes instead of an array": (msgspec.msgpack.encode(["Abort", 1, b"bytes"]), []),
    "a list instead of an array": (msgspec.msgpack.encode(["Abort", 1, [1, 2]]), []),
    "a timestamp instead of an array": (
        msgspec.msgpack.encode(["Abort", 1, msgspec.msgpack.Ext(-1, bytes(4))]),
        [],
    ),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_arrays_that_lie_are_refused(name: str) -> None:
    head, buffers = BAD_ARRAYS[name]
    with pytest.raises(WireError):
        Decoder[Any](m.FrontendToCore).decode([head, *buffers])


def test_one_frame_cannot_stand_for_two_arrays() -> None:
    extension = msgspec.msgpack.Ext(FRAME, header(6, 1) + b"\x01\0")
    sampling: list[Any] = [1, 1.0, 1.0, 0, *[1.0] * 4, 0, [], [], None, None, extension, extension]
    head = msgspec.msgpack.encode(
        ["AddRequest", 1, 1, msgspec.msgpack.Ext(INLINE, header(6, 1) + bytes(4)), 1, sampling, [0]]
    )
    with pytest.raises(WireError, match="out of order"):
        Decoder[Any](m.FrontendToCore).decode([head, bytes(4)])


BOMBS: dict[str, bytes] = {
    "deep list": b"\x91" * 100_000,
    "deep map": b"\x81\xa0" * 100_000,
    "deep in a field of the future": b"\x97"
    + msgspec.msgpack.encode("Heartbeat")
    + b"\x01\x01\x01\x01\x01"
    + b"\x91" * 100_000,
    "list of 4 G entries": b"\x93\xa4Call\x01\xdd\xff\xff\xff\xff",
    "ids of 4 G entries": msgspec.msgpack.encode(["AddRequest", 1, 1])[:-1].replace(b"\x93", b"\x97")
    + b"\x01\xdd\xff\xff\xff\xff",
    "string of 4 GB": b"\x92\xdb\xff\xff\xff\xffHello",
    "bytes of 4 GB": b"\x93\xa7Goodbye\x01\xc6\xff\xff\xff\xff",
    "extension of 4 GB": b"\x93\xa5Abort\x01\xc9\xff\xff\xff\xff\x01\x01\x01",
    "map of 4 G entries": b"\xdf\xff\xff\xff\xff",
    "seeds of 4 G entries": msgspec.msgpack.encode(
        ["AddRequest", 1, 1, msgspec.msgpack.Ext(INLINE, header(6, 1) + bytes(4)), 1, [1]]
    ).replace(b"\x96\xaaAdd", b"\x97\xaaAdd")
    + b"\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_without_allocating_what_they_claim(name: str) -> None:
    decoder = Decoder[Any](m.FrontendToCore)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            decoder.decode([BOMBS[name]])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_caps_on_frames_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder[Any](m.FrontendToCore)
    head = Encoder().encode_bytes(m.Goodbye(epoch=1, reason="x" * 1000))[0]
    for frames in ([], [head, *[b""] * MAX_FRAMES]):
        with pytest.raises(WireError, match="frames"):
            decoder.decode(frames)
    monkeypatch.setattr(codec, "MAX_HEAD_BYTES", 500)
    with pytest.raises(WireError, match="too large"):
        decoder.decode([head])
    with pytest.raises(WireError, match="does not cross"):
        Encoder().encode(m.Goodbye(epoch=1, reason="x" * 1000))
    monkeypatch.setattr(codec, "MAX_HEAD_BYTES", 5000)
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 1500)
    with pytest.raises(WireError, match="too large"):
        decoder.decode([head, bytes(1000)])


def test_a_decoder_is_as_good_as_new_after_a_refusal() -> None:
    decoder = Decoder[Any](m.FrontendToCore)
    frames = Encoder(0).encode_bytes(EXAMPLES["AddRequest"])
    for _ in range(3):
        with pytest.raises(WireError):
            decoder.decode(frames[:-1])
        assert same(decoder.decode(frames), EXAMPLES["AddRequest"])


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(WireError):
        Decoder[Any](m.FrontendToCore).decode([b"\x93\xa7Goodbye\x01\xa2\xff\xfe"])
