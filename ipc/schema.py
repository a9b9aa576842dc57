"""The protocol as data: `python -m tercet.ipc.schema [FILE]` writes what `messages.py` declares as JSON.

For frontends in other languages, and for seeing in a diff what a change does to the wire. `docs/protocol.md` says
how to read it.
"""

from __future__ import annotations

import enum
import inspect
import re
import sys
from pathlib import Path
from types import NoneType
from typing import Any, Final

import msgspec
import numpy as np

from tercet.ipc import codec, messages, telemetry
from tercet.ipc.message_base import Message, Part

INBOXES: Final = {
    "FrontendToCore": messages.FrontendToCore,
    "CoreToFrontend": messages.CoreToFrontend,
    "CoreToWorker": messages.CoreToWorker,
    "WorkerToCore": messages.WorkerToCore,
}
_FIELD = re.compile(r"^    (?P<name>\w+): [^#\n]*?(?:  # (?P<comment>.*))?$", re.MULTILINE)


def protocol() -> dict[str, Any]:
    """Everything that a peer must know to take part, as JSON values."""
    return {
        "protocol_version": messages.PROTOCOL_VERSION,
        "encoding": {
            "container": "MessagePack; a struct is an array: its tag if it has one, then its fields in order",
            "extensions": {"inline array": codec.INLINE, "array in a frame of its own": codec.FRAME},
            "dtypes": {str(code): dtype.str for code, dtype in enumerate(codec.DTYPES)},
            "inline_bytes": codec.INLINE_BYTES,
            "max_frames": codec.MAX_FRAMES,
            "max_head_bytes": codec.MAX_HEAD_BYTES,
            "max_message_bytes": codec.MAX_MESSAGE_BYTES,
            "max_dims": codec.MAX_DIMS,
        },
        "inboxes": {name: [kind.__name__ for kind in inbox.__args__] for name, inbox in INBOXES.items()},
        "structs": {kind.__name__: _struct(kind) for kind in struct_types()},
        "enums": {kind.__name__: {member.name: member.value for member in kind} for kind in _enums()},
        "failure_codes": list(messages.FAILURE_CODES),
    }


def struct_types() -> list[type[msgspec.Struct]]:
    """Every message and part, in the order of their declaration."""
    return [kind for kind in _declared(msgspec.Struct) if kind not in (Message, Part)]


def _enums() -> list[type[enum.IntEnum]]:
    return _declared(enum.IntEnum)


def _declared(base: type) -> list[Any]:
    values = [*vars(messages).values(), *vars(telemetry).values()]
    modules = (messages.__name__, telemetry.__name__)
    found = [v for v in values if isinstance(v, type) and issubclass(v, base) and v.__module__ in modules]
    return list(dict.fromkeys(found))


def _struct(kind: type[msgspec.Struct]) -> dict[str, Any]:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    comments = {m["name"]: m["comment"] for m in _FIELD.finditer(inspect.getsource(kind))}
    fields = [_field(field, comments.get(field.name)) for field in info.fields]
    return {"tag": info.tag, "doc": inspect.cleandoc(kind.__doc__ or ""), "fields": fields}


def _field(field: msgspec.inspect.Field, comment: str | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": field.name, "type": _type_name(field.type), "required": field.required}
    if not field.required:
        default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        found["default"] = int(default) if isinstance(default, enum.IntEnum) else msgspec.to_builtins(default)
    if comment:
        found["comment"] = comment
    return found


def _type_name(kind: msgspec.inspect.Type) -> str:
    match kind:
        case msgspec.inspect.ListType(item_type=item):
            return f"list[{_type_name(item)}]"
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return f"dict[{_type_name(key)}, {_type_name(value)}]"
        case msgspec.inspect.UnionType(types=types):
            return " | ".join(_type_name(member) for member in types)
        case msgspec.inspect.CustomType(cls=cls) if cls is np.ndarray:
            return "array"
        case msgspec.inspect.StructType(cls=cls) | msgspec.inspect.EnumType(cls=cls):
            return cls.__name__
        case msgspec.inspect.NoneType():
            return NoneType.__name__.removesuffix("Type").lower()
        case _:
            return type(kind).__name__.removesuffix("Type").lower()


def render() -> str:
    """The schema as it is published."""
    return msgspec.json.format(msgspec.json.encode(protocol()), indent=2).decode() + "\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(render())
    else:
        sys.stdout.write(render())
