"""Checks of single values, each raising a `ValidationError` that names the field, the fault and the fix.

Also the table of limits that no request may pass, whatever the engine: they bound what one request can cost
before its cost is known.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable
from typing import Any, Final

from tercet.errors import ValidationError
from tercet.ipc.messages import PROFILE_PREFIX

MAX_CHILDREN: Final = 16384  # n
MAX_STOP_STRINGS: Final = 128
MAX_STOP_STRING_CHARS: Final = 4096
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_LOGIT_BIASES: Final = 1024
MAX_BAD_WORDS: Final = 128  # token sequences; a word becomes one or two
MAX_BAD_WORD_CHARS: Final = 1024
MAX_ID_CHARS: Final = 1024  # request_id and cache_salt
MAX_INT32: Final = 2**31 - 1
MAX_SEED: Final = 2**64 - 1
_SHOWN_CHARS = 60


def shown(value: object) -> str:
    """The value as an error message shows it: its repr, cut short."""
    if isinstance(value, (str, bytes, list, tuple, dict, set)) and len(value) > _SHOWN_CHARS:
        return f"a {type(value).__name__} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"


def check_int(field: str, value: Any, low: int, high: int = MAX_INT32) -> int:
    """The value as an int of [low, high]. Whole numbers of numpy pass; bools and floats do not."""
    # The exact type first: an abstract class takes 20 times as long to ask.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise ValidationError(field, f"must be an integer; got {shown(value)}")
    number = int(value)
    if not low <= number <= high:
        raise ValidationError(field, f"must be in [{low}, {high}]; got {shown(value)}")
    return number


def check_float(field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The value as a finite float of [low, high]. Numbers of numpy pass; bools and strings do not."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise ValidationError(field, f"must be a number; got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValidationError(field, f"must be finite; got {shown(value)}")
    if not low <= number <= high:
        raise ValidationError(field, f"must be in [{low:g}, {high:g}]; got {shown(value)}")
    return number


def check_bool(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValidationError(field, f"must be True or False; got {shown(value)}")
    return value


def check_str(field: str, value: Any, max_chars: int = MAX_ID_CHARS) -> str:
    """The value, if it is a string that is not empty, at most `max_chars` long and valid Unicode."""
    if not isinstance(value, str):
        raise ValidationError(field, f"must be a string; got {shown(value)}")
    if not value:
        raise ValidationError(field, "must not be empty")
    if len(value) > max_chars:
        raise ValidationError(field, f"must have at most {max_chars} characters; got {len(value)}")
    check_unicode(field, value)
    return value


def check_request_ids(field: str, value: Any) -> list[str]:
    """One id or several, as a list."""
    if isinstance(value, str):
        return [value]
    ids = list(value) if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)) else None
    if ids is None or not all(isinstance(one, str) for one in ids):
        raise ValidationError(field, f"must be a request id or a list of them; got {shown(value)}")
    return ids


def check_unicode(field: str, value: str) -> None:
    """Refuse lone surrogates: they have no UTF-8 form, so neither tokenizer nor wire can take them."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"is not valid Unicode: lone surrogate {value[error.start]!r} at index {error.start}"
        raise ValidationError(field, problem) from None


def check_list(field: str, value: Any, max_items: int) -> list[Any]:
    """The value as a list of at most `max_items`; lists, tuples and sets pass."""
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValidationError(field, f"must be a list; got {shown(value)}")
    if len(value) > max_items:
        raise ValidationError(field, f"must have at most {max_items} entries; got {len(value)}")
    return list(value)


def check_int_list(field: str, value: Any, max_items: int, low: int = 0, high: int = MAX_INT32) -> list[int]:
    """The value as a list of ints of [low, high]; a fault is reported with its index."""
    items = check_list(field, value, max_items)
    return [check_int(f"{field}[{index}]", item, low, high) for index, item in enumerate(items)]


def check_token_ids(field: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Refuse ids outside the model's vocabulary: on a device they would index someone else's memory."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise ValidationError(field, f"token id {token_id} is outside the vocabulary [0, {vocab_size})")


def check_profile_prefix(prefix: Any) -> str:
    """The beginning of a trace's file name: what StartProfile takes."""
    if not isinstance(prefix, str) or not re.fullmatch(PROFILE_PREFIX, prefix):
        raise ValidationError("prefix", f"must match {PROFILE_PREFIX}; got {shown(prefix)}")
    return prefix
