"""W3C traceparent: `00-<trace id>-<parent span id>-<flags>` in hexadecimal digits.

Source: https://www.w3.org/TR/trace-context/#traceparent-header
"""

from __future__ import annotations

import re
import secrets
from typing import NamedTuple

_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


class TraceParent(NamedTuple):
    """A place in a trace: what goes on from here has `span_id` as its parent."""

    trace_id: str
    span_id: str

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"

    def child(self) -> TraceParent:
        """A new span of the same trace."""
        return TraceParent(self.trace_id, secrets.token_hex(8))


def parse(text: str) -> TraceParent | None:
    """The place that a traceparent names; None where it is malformed or not sampled."""
    match = _FORM.fullmatch(text)
    if match is None or not int(match[3], 16) & _SAMPLED:
        return None
    return TraceParent(match[1], match[2])
