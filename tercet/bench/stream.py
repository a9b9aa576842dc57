"""One streamed answer of the OpenAI API, recorded: when which tokens came.

A chunk counts as one arrival of tokens if it has a choice, with two exceptions: a chat's opening chunk that
only names the role, which servers may send before any token exists, and a closing chunk that carries nothing
but a finish_reason. Chunks with empty text count: a token need not have text of its own.
"""

from __future__ import annotations

import itertools
from typing import Final

import msgspec

MAX_ERROR_CHARS: Final = 500


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class RequestResult(msgspec.Struct, array_like=True, kw_only=True):
    """What became of one request. Times are `time.perf_counter()` seconds, one clock for the whole machine.

    Attributes:
        index: of the request in the run.
        start_s: when it was sent; waiting for a place under max_concurrency comes before.
        end_s: the last event of the answer.
        queue_s: how long it waited for that place.
        token_times_s: arrival of each chunk with tokens, ascending.
        prompt_tokens, output_tokens: as the server's usage says; None where it says nothing.
        text: of the answer; empty where the run keeps none.
        error: empty if the request succeeded.
    """

    index: int
    start_s: float = 0.0
    end_s: float = 0.0
    queue_s: float = 0.0
    token_times_s: list[float] = []
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    text: str = ""
    error: str = ""

    @property
    def success(self) -> bool:
        return not self.error

    @property
    def latency_s(self) -> float:
        return self.end_s - self.start_s if self.success else 0.0

    @property
    def ttft_s(self) -> float:
        """Time to the first token; 0 where there is none."""
        return self.token_times_s[0] - self.start_s if self.token_times_s else 0.0

    @property
    def itls_s(self) -> list[float]:
        """Gaps between chunks."""
        times = self.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]


class StreamRecorder:
    """Receives one answer (`http_client.Receiver`) and makes a RequestResult of it."""

    __slots__ = ("_body", "_ended", "_error", "_last_s", "_pieces", "_rest", "_status", "_times", "_usage")

    def __init__(self) -> None:
        self._status = 0
        self._rest = b""
        self._body: list[bytes] = []  # of an answer that is no stream: an error's
        self._times: list[float] = []
        self._pieces: list[str] = []
        self._usage: _Usage | None = None
        self._error = ""
        self._last_s = 0.0
        self._ended = False

    def on_head(self, status: int, now: float) -> None:
        self._status = status

    def on_body(self, data: bytes, now: float) -> None:
        if self._status != 200:
            self._body.append(data)
            return
        if self._rest:
            data = self._rest + data
        if b"\r\n" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._rest = data.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and b"\n" not in event:
                self._on_data(event[6:], now)
            else:
                self._on_event(event, now)

    def result(self, index: int, start_s: float, queue_s: float, *, keep_text: bool) -> RequestResult:
        """The record of the exchange, which is complete.

        The text is kept also where the server sends no usage, for its tokens to be counted.
        """
        if self._rest.strip() and not self._error:
            self._on_event(self._rest, self._last_s)
        usage = self._usage or _Usage()
        return RequestResult(
            index=index,
            start_s=start_s,
            end_s=self._last_s,
            queue_s=queue_s,
            token_times_s=self._times,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            text="".join(self._pieces) if keep_text or usage.completion_tokens is None else "",
            error=self._problem(),
        )

    def _problem(self) -> str:
        if self._error:
            return self._error
        if self._status != 200:
            body = b"".join(self._body).decode("utf-8", "replace")
            return f"HTTP {self._status}: {body[:MAX_ERROR_CHARS]}"
        if not self._times:
            return "the answer has no tokens; is it a stream of this API?"
        return "" if self._ended else "the stream ended before its end: no finish_reason and no [DONE]"

    def _on_event(self, event: bytes, now: float) -> None:
        """An event of several lines, or with a comment."""
        data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if data:
            self._on_data(b"\n".join(data), now)

    def _on_data(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            chunk = _decode_chunk(data)
        except msgspec.MsgspecError as error:
            self._error = self._error or f"a chunk cannot be read: {error}; got {data[:80]!r}"
            return
        if chunk.choices:
            self._on_choice(chunk.choices[0], now)
        elif chunk.error:
            words = bytes(chunk.error).decode("utf-8", "replace")
            self._error = self._error or f"error in the stream: {words[:MAX_ERROR_CHARS]}"
        if chunk.usage is not None:
            self._usage = chunk.usage

    def _on_choice(self, choice: _Choice, now: float) -> None:
        self._last_s = now
        text, delta = choice.text, choice.delta
        opening = False
        carries = bool(text)
        if delta is not None:
            text = delta.content or delta.reasoning_content or delta.reasoning
            carries = bool(text or delta.tool_calls)
            opening = delta.role is not None and not self._times
        if text:
            self._pieces.append(text)
        ending = choice.finish_reason is not None
        self._ended = self._ended or ending
        if not carries and (self._times if ending else opening):
            return
        self._times.append(now)
