"""The protocol holds still: committed frames of every message, growth by appended fields, a published schema."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tercet.ipc import messages, schema
from tercet.ipc.codec import Decoder, Encoder
from tercet.ipc.errors import WireError
from tercet.ipc.message_base import Message
from tests.ipc.compare import same
from tests.ipc.golden_messages import EXAMPLES, FOLDER, encode, inboxes_of, pack, read

DOCS = Path(__file__).resolve().parents[2] / "docs"


def required_fields(kind: type[msgspec.Struct]) -> int:
    return len(kind.__struct_fields__) - len(kind.__struct_defaults__)


# ------------------------------------------------------------------------------------ golden frames


@pytest.mark.parametrize("name", EXAMPLES)
def test_committed_frames_decode_to_their_message(name: str) -> None:
    for inbox in inboxes_of(EXAMPLES[name]):
        assert same(Decoder(inbox).decode(read(name)), EXAMPLES[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_messages_still_encode_to_their_committed_frames(name: str) -> None:
    assert pack(encode(EXAMPLES[name])) == (FOLDER / f"{name}.bin").read_bytes()


def test_every_message_of_every_inbox_has_a_golden_frame() -> None:
    in_inboxes = {kind.__name__ for inbox in schema.INBOXES.values() for kind in inbox.__args__}
    calls = {f"Call.{kind.__name__}" for kind in messages.CallBody.__args__}
    assert set(EXAMPLES) == in_inboxes - {"Call"} | calls
    assert {path.stem for path in FOLDER.glob("*.bin")} == set(EXAMPLES)


def test_every_declared_message_is_in_an_inbox() -> None:
    declared = {kind for kind in schema.struct_types() if issubclass(kind, Message)}
    assert declared == {kind for inbox in schema.INBOXES.values() for kind in inbox.__args__}


def test_examples_set_every_field_and_part() -> None:
    """A field at its default would not show a change of its place."""
    seen: set[type] = set()

    def visit(value: Any) -> None:
        if isinstance(value, msgspec.Struct):
            seen.add(type(value))
            defaults = value.__struct_fields__[required_fields(type(value)) :]
            for name in defaults:
                assert not same(getattr(value, name), _default(type(value), name)), (
                    f"{type(value).__name__}.{name}"
                )
            for name in value.__struct_fields__:
                visit(getattr(value, name))
        elif isinstance(value, list):
            for item in value:
                visit(item)

    for example in EXAMPLES.values():
        visit(example)
    assert seen == set(schema.struct_types())


def _default(kind: type[msgspec.Struct], name: str) -> Any:
    field = next(field for field in msgspec.structs.fields(kind) if field.name == name)
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


# ------------------------------------------------------------------------------------ growth


def _head(message: msgspec.Struct) -> list[Any]:
    """The MessagePack frame of a message as plain values."""
    plain: list[Any] = msgspec.msgpack.decode(Encoder().encode_bytes(message)[0])
    return plain


@pytest.mark.parametrize("name", EXAMPLES)
def test_frames_without_the_fields_that_have_defaults_decode(name: str) -> None:
    """What an older peer sends, which knows only the first fields."""
    example = EXAMPLES[name]
    kind = type(example)
    for count in range(required_fields(kind), len(kind.__struct_fields__)):
        head = _head(example)[: 1 + count]
        for inbox in inboxes_of(example):
            decoded = Decoder[Any](inbox).decode([msgspec.msgpack.encode(head)])
            for i, field in enumerate(kind.__struct_fields__):
                expected = getattr(example, field) if i < count else _default(kind, field)
                assert same(getattr(decoded, field), expected), field


@pytest.mark.parametrize("name", EXAMPLES)
def test_frames_with_fields_of_the_future_decode(name: str) -> None:
    """What a newer peer sends: more fields, which are skipped."""
    head = [*_head(EXAMPLES[name]), "new", [1, {"deep": None}], 2.5]
    for inbox in inboxes_of(EXAMPLES[name]):
        assert same(Decoder(inbox).decode([msgspec.msgpack.encode(head)]), EXAMPLES[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_frames_without_a_required_field_are_refused(name: str) -> None:
    example = EXAMPLES[name]
    head = _head(example)[: required_fields(type(example))]
    for inbox in inboxes_of(example):
        with pytest.raises(WireError):
            Decoder(inbox).decode([msgspec.msgpack.encode(head)])


@pytest.mark.parametrize("name", EXAMPLES)
def test_messages_for_another_inbox_are_refused(name: str) -> None:
    for inbox in schema.INBOXES.values():
        if inbox not in inboxes_of(EXAMPLES[name]):
            with pytest.raises(WireError):
                Decoder(inbox).decode(read(name))


# ------------------------------------------------------------------------------------ what is written about it


def test_docstrings_name_sender_and_receiver() -> None:
    for kind in schema.struct_types():
        if issubclass(kind, Message):
            assert re.match(
                r"[\w ()]+ -> [\w ()]+|Any -> any|Either end", inspect.cleandoc(kind.__doc__ or "")
            ), kind


def test_columns_say_their_dtype() -> None:
    for name, struct in schema.protocol()["structs"].items():
        for field in struct["fields"]:
            if "array" in field["type"]:
                comment = field.get("comment", "")
                assert (
                    "reserved" in comment
                    or re.match(r"[iuf]\d+\[|data", comment)
                    or name == "MultiModalRange"
                ), f"{name}.{field['name']}: {comment}"


def test_the_published_schema_is_up_to_date() -> None:
    """If this fails after a change that is meant: python -m tercet.ipc.schema docs/protocol.json"""
    assert (DOCS / "protocol.json").read_text() == schema.render()


def test_the_protocol_document_names_every_message() -> None:
    text = (DOCS / "protocol.md").read_text()
    missing = [kind.__name__ for kind in schema.struct_types() if f"`{kind.__name__}`" not in text]
    assert missing == []


def test_the_schema_lists_fields_in_their_order_on_the_wire() -> None:
    for kind in schema.struct_types():
        fields = schema.protocol()["structs"][kind.__name__]["fields"]
        assert [field["name"] for field in fields] == list(kind.__struct_fields__)
        assert [field["required"] for field in fields] == sorted(
            (f["required"] for f in fields), reverse=True
        )
