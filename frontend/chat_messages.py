"""Chat messages as a template may see them: checked, plain, in one of two forms of content.

Messages come from clients. What a template gets is rebuilt from JSON's own types, so that no object with
methods of its own reaches it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from tercet.errors import ValidationError
from tercet.frontend.validation import shown

Message: TypeAlias = Mapping[str, Any]
# How a template takes `content`: as text, as a list of parts, or either.
ContentForm: TypeAlias = Literal["string", "parts", "either"]

_MAX_DEPTH = 64
_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal"})
# What says nothing by itself: a message that has no more than these must have content.
_FRAME = frozenset({"role", "content", "name", "tool_call_id"})
_TEXT_EXAMPLE = '"Hello" or [{"type": "text", "text": "Hello"}]'
# The names that a message's reasoning goes by. Templates read the first or, gpt-oss, the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def normalize_messages(messages: Sequence[Message], form: ContentForm) -> list[dict[str, Any]]:
    """Fresh copies of the messages, ready for a template.

    Content parts become text joined by line breaks where the template wants text, and text becomes one part
    where it wants parts. The JSON text of tool call arguments becomes the object that it is.

    Raises:
        ValidationError: names the message and field that is wrong, or the kind of part that is not text.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValidationError("messages", f"must be a list of messages; got {shown(messages)}")
    if not messages:
        raise ValidationError("messages", "is empty; give at least one message")
    return [_normalize(message, f"messages[{index}]", form) for index, message in enumerate(messages)]


def plain_data(value: Any, field: str, depth: int = 0) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None only.

    Raises:
        ValidationError: it holds anything else, or is nested deeper than 64 levels.
    """
    if depth > _MAX_DEPTH:
        raise ValidationError(field, f"is nested deeper than {_MAX_DEPTH} levels")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # enums and their like carry methods of their own
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain_key(key, field): plain_data(item, field, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item, field, depth + 1) for item in value]
    raise ValidationError(field, f"must be made of JSON types; holds a {type(value).__name__}")


def _plain_key(key: Any, field: str) -> str:
    if not isinstance(key, str):
        raise ValidationError(field, f"has a key that is not a string: {shown(key)}")
    return str.__str__(key)


def _normalize(message: Any, field: str, form: ContentForm) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValidationError(field, f"must be an object with role and content; got {shown(message)}")
    plain: dict[str, Any] = plain_data(message, field)
    _check_role(plain, f"{field}.role")
    if plain.get("content") is None and not any(plain[name] for name in plain.keys() - _FRAME):
        what = "is null" if "content" in plain else "is missing"
        raise ValidationError(f"{field}.content", f"{what}; give text, such as {_TEXT_EXAMPLE}")
    if "content" in plain:
        plain["content"] = _content(plain["content"], f"{field}.content", form)
    for index, call in enumerate(plain.get("tool_calls") or ()):
        _parse_arguments(call, f"{field}.tool_calls[{index}]")
    reasoning = next((plain[name] for name in _REASONING_FIELDS if plain.get(name) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _check_role(message: dict[str, Any], field: str) -> None:
    if not message.get("role") or not isinstance(message["role"], str):
        got = f"got {shown(message['role'])}" if "role" in message else "it is missing"
        raise ValidationError(field, f"must be a string such as 'system', 'user' or 'assistant'; {got}")


def _content(content: Any, field: str, form: ContentForm) -> Any:
    if content is None:
        return None
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form == "parts" else content
    if not isinstance(content, list):
        problem = f"must be a string or a list of parts, such as {_TEXT_EXAMPLE}; got {shown(content)}"
        raise ValidationError(field, problem)
    texts = [_part_text(part, f"{field}[{index}]") for index, part in enumerate(content)]
    return "\n".join(texts) if form == "string" else [{"type": "text", "text": text} for text in texts]


def _part_text(part: Any, field: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        problem = f'must be an object such as {{"type": "text", "text": "Hello"}}; got {shown(part)}'
        raise ValidationError(field, problem)
    kind = part.get("type", "text")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        raise ValidationError(
            f"{field}.type",
            f"is {shown(kind)}, but this model takes text only ({', '.join(sorted(_TEXT_PARTS))})",
        )
    name = "refusal" if kind == "refusal" else "text"
    text = part.get(name)
    if not isinstance(text, str):
        raise ValidationError(f"{field}.{name}", f"must be a string; got {shown(text)}")
    return text


def _parse_arguments(call: Any, field: str) -> None:
    """Templates print a call's arguments with tojson, so they must be an object, not its JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValidationError(field, f"must be an object with a function; got {shown(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise ValidationError(f"{field}.function.arguments", f"is not valid JSON ({error})") from None
    elif arguments is None:
        function["arguments"] = {}
