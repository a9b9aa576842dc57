"""Server-sent events of streamed chats and completions, put together from bytes made once for a stream.

Of a chunk only text, usage and the ends change, so all else is a template:

    data: {"id":"…","object":"…","created":…,"model":"…","choices":[{"index":0,"delta":{"content":  ← head
    "Hello"                                                                                          ← text
    },"logprobs":null,"finish_reason":null}]}⏎⏎                                                      ← tail
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from tercet.frontend.server.errors import ApiError
from tercet.frontend.server.responses import Usage

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"

encode: Final = msgspec.json.Encoder().encode


def named_event(name: str, data: Any) -> bytes:
    """One event with a name and JSON data."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(data))


class StreamEnd:
    """How a stream says that it ends with an error."""

    def error(self, error: ApiError) -> bytes:
        return b"data: %b\n\n%b" % (error.json(), DONE)


class ChunkEncoder:
    """Chunks of one stream.

    Args:
        request_id, kind, created_s, model: fields of every chunk; `kind` is its `object`.
        chat: text goes into `delta.content`; else into `text`.
        usage_field: chunks have a `usage`, null where none is given.
    """

    def __init__(
        self, request_id: str, kind: str, created_s: int, model: str, *, chat: bool, usage_field: bool
    ) -> None:
        fields = encode({"id": request_id, "object": kind, "created": created_s, "model": model})
        self._prefix = b"data: %b," % fields[:-1]
        self._chat = chat
        self._usage_field = usage_field
        self._heads: list[bytes] = []  # of each choice, up to its text
        self._plain_tail = self._tail(b"null", None, None, None, None, None)

    def text(self, index: int, text: str) -> bytes:
        """The common chunk: a piece of text and nothing else."""
        return b"%b%b%b" % (self._head(index), encode(text), self._plain_tail)

    def chunk(
        self,
        index: int,
        text: str,
        *,
        logprobs: Any = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
        token_ids: list[int] | None = None,
        prompt_token_ids: list[int] | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """A chunk with anything that one may have."""
        tail = self._tail(encode(logprobs), finish_reason, stop_reason, token_ids, prompt_token_ids, usage)
        return b"%b%b%b" % (self._head(index), encode(text), tail)

    def role(self, index: int, prompt_token_ids: list[int] | None) -> bytes:
        """The first chunk of a choice of a chat."""
        extra = b""
        if prompt_token_ids is not None:
            extra = b',"prompt_token_ids":%b' % encode(prompt_token_ids)
        return (
            b'%b"choices":[{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}]%b%b}\n\n' % (self._prefix, index, extra, self._usage(None))
        )

    def usage(self, usage: Usage) -> bytes:
        """The last chunk: no choices, only the usage."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._prefix, encode(usage))

    def _head(self, index: int) -> bytes:
        heads = self._heads
        while len(heads) <= index:
            opening = b'"delta":{"content":' if self._chat else b'"text":'
            heads.append(b'%b"choices":[{"index":%d,%b' % (self._prefix, len(heads), opening))
        return heads[index]

    def _tail(
        self,
        logprobs: bytes,
        finish_reason: str | None,
        stop_reason: int | str | None,
        token_ids: list[int] | None,
        prompt_token_ids: list[int] | None,
        usage: Usage | None,
    ) -> bytes:
        parts = [b"}," if self._chat else b","]
        parts.append(b'"logprobs":%b,"finish_reason":%b' % (logprobs, encode(finish_reason)))
        if finish_reason is not None:
            parts.append(b',"stop_reason":%b' % encode(stop_reason))
        if token_ids is not None:
            parts.append(b',"token_ids":%b' % encode(token_ids))
        if prompt_token_ids is not None:
            parts.append(b',"prompt_token_ids":%b' % encode(prompt_token_ids))
        parts.append(b"}]%b}\n\n" % self._usage(usage))
        return b"".join(parts)

    def _usage(self, usage: Usage | None) -> bytes:
        return b',"usage":%b' % encode(usage) if self._usage_field else b""
