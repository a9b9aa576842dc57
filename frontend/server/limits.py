"""The limits of what one HTTP request may cost, in one table. docs/server.md shows it.

They are enforced before anything is copied or computed. Limits of single parameters (number of stop strings,
of logit biases and so on) are in `tercet.frontend.validation`, for they hold for every front door.
"""

from __future__ import annotations

from typing import Final

import msgspec

from tercet.errors import ConfigError


class HttpLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What an HTTP request may measure. Beyond it: 414, 431, 413 or 408, and the connection is closed.

    Attributes:
        max_url_bytes: path and query.
        max_header_bytes: names and values of all headers together.
        max_header_count: headers.
        max_body_bytes: body, whether announced or sent in chunks.
        head_timeout_s: for the head of a request to arrive, from its first byte or the connection's start.
        body_timeout_s: for the body to arrive after the head.
        write_timeout_s: for a client to read, once what waits to be sent to it fills the buffer of its connection;
            what it then has not read is dropped with the connection, and its request aborted.
    """

    max_url_bytes: int = 8 << 10
    max_header_bytes: int = 64 << 10
    max_header_count: int = 256
    max_body_bytes: int = 32 << 20
    head_timeout_s: float = 30.0
    body_timeout_s: float = 120.0
    write_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not getattr(self, name) > 0:
                raise ConfigError(name, f"must be greater than 0; got {getattr(self, name)!r}")


MAX_PROMPTS: Final = 1024
"""Prompts of one completion request."""

MAX_MESSAGES: Final = 16384
"""Messages of one chat."""

MAX_REQUEST_ID_CHARS: Final = 128
"""Of X-Request-Id and `request_id`; printable ASCII."""
