"""From the core's columns to each request's outputs.

`OutputProcessor.apply` takes one StepOutputs and appends its tokens to the requests they belong to: one loop,
no object per token. What a consumer sees is made when it looks (`RequestState.take`), so deltas that it has
not fetched yet merge by themselves, and a slow consumer costs no more memory than its request's tokens.

    StepOutputs ──apply──▶ token_ids of each child ──take──▶ text, logprobs, RequestOutput
                              │ (stop strings: text at once, for the request may end here)
                              └─▶ wakes who waits for the request, once per message

Text is made in `apply` only where stop strings have to be looked for. Knows neither sockets nor event loops:
who waits leaves a `Waiter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from tercet import histogram
from tercet.errors import RequestError, TercetError, ValidationError
from tercet.frontend.flat_logprobs import PromptLogprobs, SampleLogprobs
from tercet.frontend.input_processor import PreparedRequest
from tercet.frontend.logprobs import LogprobsReader
from tercet.frontend.outputs import (
    CompletionOutput,
    FinishReason,
    RequestOutput,
    RequestStateStats,
)
from tercet.frontend.sampling_params import RequestOutputKind, SamplingParams
from tercet.frontend.stop_strings import OutputText
from tercet.frontend.waking import TaskWaker, Waiter
from tercet.histogram import Histogram
from tercet.ipc.messages import Finish, Started, StepOutputs
from tercet.log import get_logger

logger = get_logger(__name__)

REASONS: Final[dict[int, FinishReason]] = {
    Finish.EOS: "stop",
    Finish.STOP_TOKEN: "stop",
    Finish.LENGTH: "length",
    Finish.ABORT: "abort",
    Finish.ERROR: "error",
}
_ENDED_BY_TOKEN: Final = (Finish.EOS, Finish.STOP_TOKEN)
_NEVER: Final = 1 << 62


class Child:
    """One of the n completions of a request."""

    __slots__ = (
        "append",
        "cumulative_logprob",
        "eager",
        "finish",
        "handle",
        "index",
        "logprobs",
        "num_pushed",
        "num_taken",
        "parts",
        "reader",
        "request",
        "stop_string",
        "text",
        "token_ids",
        "wake_at",
    )

    def __init__(self, request: RequestState, index: int) -> None:
        self.request = request
        self.index = index
        self.handle = -1  # until admitted
        self.token_ids: list[int] = []
        self.num_pushed = 0  # tokens that `text` has
        self.num_taken = 0  # tokens that the consumer has
        self.wake_at = 0  # more tokens than this are news for the consumer
        self.text: OutputText | None = None
        self.append: Callable[[list[int]], str] | None = None  # tokens into text, where no end can come of it
        self.eager = False  # its text is made as tokens arrive, for a stop string may end it
        self.parts: list[str] = []  # text for the consumer: what it has not had (DELTA), or all
        self.reader: LogprobsReader | None = None
        self.logprobs: SampleLogprobs = []
        self.cumulative_logprob = 0.0
        self.finish = Finish.NONE
        self.stop_string: str | None = None

    def push(self) -> str:
        """Turn tokens that have no text yet into text; a stop string ends the child and cuts its tokens."""
        if self.text is None:
            return ""
        start, finish = self.num_pushed, self.finish
        tokens = self.token_ids[start:]
        delta, stop_string, used = self.text.push(
            tokens, finish != Finish.NONE, ended_by_stop_token=bool(tokens) and finish in _ENDED_BY_TOKEN
        )
        self.num_pushed = start + used
        if stop_string is not None:
            self._cut(stop_string)
        return delta

    def push_eagerly(self) -> None:
        """`push`, keeping the text for the consumer."""
        text, num_tokens = self.text, len(self.token_ids)
        if text is not None and self.num_pushed == num_tokens - 1 and not self.finish:  # the common case
            delta = text.push_token(self.token_ids[-1])
            self.num_pushed = num_tokens
            if text.stop_reason is not None:
                self._cut(text.stop_reason)
        else:
            delta = self.push()
        if delta:
            self.parts.append(delta)

    def _cut(self, stop_string: str) -> None:
        self.stop_string, self.finish = stop_string, Finish.EOS
        if self.num_pushed < len(self.token_ids):
            del self.token_ids[self.num_pushed :]
            if self.reader is not None:
                self.logprobs = self.logprobs[: self.num_pushed]
                self.cumulative_logprob = sum(next(iter(entry.values())).logprob for entry in self.logprobs)

    def completion(self, delta: bool) -> CompletionOutput:
        """What the consumer shall see now: what is new, or everything."""
        token_ids, start = self.token_ids, self.num_taken
        self.num_taken = count = len(token_ids)
        if delta and not self.finish:  # the common case, kept short
            token_ids = [token_ids[-1]] if count == start + 1 else token_ids[start:]
            if self.append is not None:
                text = self.append(token_ids)
                self.num_pushed = count
            else:
                text = self._take_parts() if self.eager else ""
            output = CompletionOutput(self.index, text, token_ids)
        else:
            start = start if delta else 0
            if not self.eager:
                self.parts.append(self.push())
            text = self._take_parts()
            if not delta:
                self.parts.append(text)
            reason, stop_reason = self._reasons()
            output = CompletionOutput(self.index, text, token_ids[start:], None, None, reason, stop_reason)
        if self.reader is not None:
            output.cumulative_logprob, output.logprobs = self.cumulative_logprob, self.logprobs[start:]
        return output

    def _take_parts(self) -> str:
        text = "".join(self.parts)
        self.parts.clear()
        return text

    def _reasons(self) -> tuple[FinishReason | None, int | str | None]:
        if not self.finish:
            return None, None
        stop_reason: int | str | None = self.stop_string
        if self.finish == Finish.STOP_TOKEN and stop_reason is None:
            stop_reason = self.token_ids[-1]
        return REASONS[self.finish], stop_reason


class RequestState:
    """One request on its way: what came from the core, and what the consumer has had of it.

    `take` and `take_ready` belong to one consumer. `ready` says that it has something to give or to raise.
    `waiter` is the consumer's place to wait: set while nothing is ready, it is woken (and set to None) when
    something is.
    """

    __slots__ = (
        "children",
        "error",
        "is_delta",
        "kind",
        "num_cached_tokens",
        "num_unfinished",
        "on_finish",
        "prompt",
        "prompt_logprobs",
        "prompt_reader",
        "prompt_token_ids",
        "ready",
        "request_id",
        "slack",
        "stats",
        "taken",
        "trace",
        "waiter",
    )

    def __init__(self, request_id: str, params: SamplingParams, arrival_s: float) -> None:
        self.request_id = request_id
        self.kind = params.output_kind
        self.is_delta = self.kind is RequestOutputKind.DELTA
        self.slack = (params.stream_interval or 1) - 1  # tokens that are no news by themselves
        self.children = [Child(self, index) for index in range(params.n)]
        self.num_unfinished = params.n
        self.prompt: str | None = None
        self.prompt_token_ids: list[int] = []
        self.prompt_reader: LogprobsReader | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        self.num_cached_tokens: int | None = None
        self.stats = RequestStateStats(arrival_s)
        self.error: TercetError | None = None
        self.trace = ""  # W3C traceparent of its span; empty where it is not traced
        self.ready = False
        self.waiter: Waiter | None = None
        self.taken = False  # the consumer has had the last output
        self.on_finish: tuple[Callable[[RequestState], None], ...] = ()
        if self.kind is RequestOutputKind.FINAL_ONLY:
            for child in self.children:
                child.wake_at = _NEVER

    @property
    def finished(self) -> bool:
        """Whether nothing more will come, though the consumer may not have taken it all."""
        return self.num_unfinished == 0

    def take(self) -> RequestOutput | None:
        """What is new for the consumer, or None. Raises as `take_ready`."""
        return self.take_ready() if self.ready else None

    def take_ready(self) -> RequestOutput:
        """What is new for the consumer; only where `ready` says that something is.

        Raises:
            TercetError: the request has failed, or its engine has.
        """
        if self.error is not None:
            self.taken = True
            raise self.error
        self.ready = False
        children = self.children
        if len(children) == 1:
            child = children[0]
            outputs = [child.completion(self.is_delta)]
            self.stats.num_generation_tokens = num_taken = child.num_taken
            child.wake_at = num_taken + self.slack
        else:
            outputs = self._take_children(self.is_delta)
        prompt_logprobs = self.prompt_logprobs
        if prompt_logprobs is not None and self.is_delta:
            self.prompt_logprobs = self.prompt_reader = None
        finished = self.num_unfinished == 0
        if finished:
            self.taken = True
            self.children = []  # breaks the reference cycle, so that no garbage collector is needed
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            prompt_logprobs,
            outputs,
            finished,
            self.stats,
            self.num_cached_tokens,
        )

    def discard(self) -> None:
        """The consumer has left: there is nothing to take any more."""
        self.taken, self.ready = True, False
        self.children = []

    def _take_children(self, delta: bool) -> list[CompletionOutput]:
        """Of n > 1 completions those that are news (DELTA), or all."""
        outputs = []
        for child in self.children:
            fresh = len(child.token_ids) > child.wake_at
            if fresh or not delta:
                outputs.append(child.completion(delta))
            if fresh:
                child.wake_at = _NEVER if child.finish else child.num_taken + self.slack
        self.stats.num_generation_tokens = sum(len(child.token_ids) for child in self.children)
        return outputs

    def wake(self) -> None:
        """Something is ready."""
        self.ready = True
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.wake()


class OutputProcessor:
    """All unfinished requests of one frontend, by handle and by id."""

    def __init__(self, abort: Callable[[list[int], Finish], None]) -> None:
        """Args: abort: tells the core to forget these handles."""
        self._abort = abort
        self._children: dict[int, Child] = {}
        self._next_handle = 1
        self.requests: dict[str, RequestState] = {}
        self.waker: TaskWaker | None = None  # shared by the streams of these requests, who make it
        self.first_token_s = Histogram(histogram.FIRST_TOKEN_S)  # of completions, from arrival on
        self.e2e_s = Histogram(histogram.REQUEST_S)
        self.num_malformed = 0  # messages whose columns contradict each other
        self.num_dropped_tokens = 0  # tokens that had already come

    # ---- requests come and go

    def open(self, request_id: str, params: SamplingParams, arrival_s: float) -> RequestState:
        """A new request under this id, not yet known to the core.

        Raises:
            ValidationError: an unfinished request has this id.
        """
        if request_id in self.requests:
            raise ValidationError("request_id", f"{request_id!r} is already in use by an unfinished request")
        request = self.requests[request_id] = RequestState(request_id, params, arrival_s)
        return request

    def admit(self, request: RequestState, prepared: PreparedRequest) -> int:
        """Make a request ready for outputs; returns the handle of its first child, and so of AddRequest."""
        request.prompt, request.prompt_token_ids = prepared.prompt, prepared.prompt_token_ids
        request.prompt_reader = prepared.prompt_reader
        if prepared.prompt_reader is not None:  # the first position has none, nor has a prompt of one token
            request.prompt_logprobs = prepared.prompt_reader.no_prompt_entries(len(request.prompt_token_ids))
        first = self._next_handle
        self._next_handle += len(request.children)
        for child in request.children:
            child.handle = first + child.index
            if prepared.reader is not None:
                child.reader, child.logprobs = prepared.reader, prepared.reader.no_entries()
            if prepared.make_text is not None:
                child.text, child.eager = prepared.make_text(), prepared.has_stop_strings
                child.append = None if child.eager else child.text.append
            self._children[child.handle] = child
        return first

    def abort(self, request: RequestState) -> None:
        """End what is unfinished of a request with 'abort'. Idempotent."""
        handles = []
        for child in request.children:
            if not child.finish:
                if child.handle >= 0:
                    handles.append(child.handle)
                self._finish(child, Finish.ABORT)
        if handles:
            self._abort(handles, Finish.ABORT)
        request.wake()

    def fail(self, request: RequestState, error: TercetError) -> None:
        """End a request with an error, which its consumer is given. The core is told of nothing."""
        if request.error is not None or request.taken:
            return
        request.error = error
        for child in request.children:
            self._children.pop(child.handle, None)
        request.num_unfinished = 0
        self._forget(request)
        request.children = []
        request.wake()

    def fail_handle(self, handle: int, make_error: Callable[[str], TercetError]) -> None:
        """End the request that one of these handles belongs to, as the core says that it failed."""
        child = self._children.get(handle)
        if child is None:
            return
        request = child.request
        others = [c.handle for c in request.children if not c.finish and c is not child]
        self.fail(request, make_error(request.request_id))
        if others:
            self._abort(others, Finish.ABORT)

    def fail_all(self, error: TercetError) -> None:
        """End every request with an error of this kind, each with one of its own."""
        for request in list(self.requests.values()):
            self.fail(request, type(error)(*error.args))

    def _forget(self, request: RequestState) -> None:
        if self.requests.get(request.request_id) is request:
            del self.requests[request.request_id]
        for callback in request.on_finish:
            callback(request)

    # ---- tokens come

    def apply(self, outputs: StepOutputs) -> None:
        """Append a step's tokens to their requests and wake the consumers."""
        handles, firsts = outputs.handle.tolist(), outputs.first_index.tolist()
        tokens, finishes = outputs.token.tolist(), outputs.finish.tolist()
        if not len(handles) == len(firsts) == len(finishes):
            self._malformed(outputs)
            return
        if outputs.started is not None:
            self._apply_started(outputs.started)
        if outputs.prompt_logprobs is not None:
            self._apply_prompt_logprobs(outputs)
        if outputs.offset is not None or outputs.logprobs is not None:
            self._apply_spans(outputs, handles, firsts, tokens, finishes)
            return
        if len(tokens) != len(handles):
            self._malformed(outputs)
            return
        # Steady decode, and the reason for this loop's bareness: one token per request, seldom an end.
        children = self._children
        for handle, first, token, finish in zip(handles, firsts, tokens, finishes, strict=True):
            child = children.get(handle)
            if child is None:
                continue  # aborted here while the token was on its way
            token_ids = child.token_ids
            count = len(token_ids)
            if first != count:
                self._misplaced(child, first, 1, finish)
                continue
            token_ids.append(token)
            if finish:
                self._advance(child, finish)
            elif child.eager:
                child.push_eagerly()
                if child.finish:
                    self._stop(child)
            if count >= child.wake_at:
                request = child.request
                request.ready = True
                waiter = request.waiter
                if waiter is not None:
                    request.waiter = None
                    waiter.wake()

    def _apply_spans(
        self,
        outputs: StepOutputs,
        handles: list[int],
        firsts: list[int],
        tokens: list[int],
        finishes: list[int],
    ) -> None:
        """The general case: any number of tokens per request, with log-probabilities."""
        offsets = list(range(len(handles) + 1)) if outputs.offset is None else outputs.offset.tolist()
        if (
            len(offsets) != len(handles) + 1
            or offsets[0] != 0
            or offsets[-1] != len(tokens)
            or sorted(offsets) != offsets
        ):
            self._malformed(outputs)
            return
        rows = _rows_by_key(outputs.logprobs.key) if outputs.logprobs is not None else {}
        for i, handle in enumerate(handles):
            child = self._children.get(handle)
            if child is None:
                continue
            span = tokens[offsets[i] : offsets[i + 1]]
            skip = len(child.token_ids) - firsts[i]
            if skip < 0 or skip >= len(span) > 0:
                self._misplaced(child, firsts[i], len(span), finishes[i])
                continue
            if child.reader is not None and span:
                read = child.reader.sample(outputs.logprobs, rows.get(handle, ()), len(span))
                if read is None:
                    self._fault(child, "came without its log-probabilities")
                    continue
                entries, chosen = read
                child.logprobs.extend(entries[skip:])
                child.cumulative_logprob += sum(chosen[skip:])
            child.token_ids += span[skip:]
            self.num_dropped_tokens += skip
            if finishes[i] or child.eager:
                self._advance(child, finishes[i])
            if len(child.token_ids) > child.wake_at:
                child.request.wake()

    def _advance(self, child: Child, finish: int) -> None:
        """What a new token may set off: a stop string, the end."""
        if finish:
            if finish in REASONS:
                self._finish(child, Finish(finish))
            else:
                self._fault(child, f"ended for an unknown reason ({finish})")
            return
        child.push_eagerly()
        if child.finish:
            self._stop(child)

    def _stop(self, child: Child) -> None:
        """A stop string has ended the child, of which the core does not know."""
        self._abort([child.handle], Finish.EOS)
        self._finished(child)

    def _finish(self, child: Child, finish: Finish) -> None:
        if finish == Finish.ERROR:
            self._fault(child, "failed in the engine")
            return
        child.finish = finish
        if child.eager:
            child.push_eagerly()
        self._finished(child)

    def _finished(self, child: Child) -> None:
        request = child.request
        self._children.pop(child.handle, None)
        request.num_unfinished -= 1
        if request.kind is not RequestOutputKind.FINAL_ONLY or not request.num_unfinished:
            child.wake_at = -1  # so that its end is news
        e2e_s = time.time() - request.stats.arrival_time
        if child.finish != Finish.ABORT:
            self.e2e_s.observe(e2e_s)
        if not request.num_unfinished:
            request.stats.e2e_latency = e2e_s
            self.e2e_s.fold()
            self._forget(request)

    def _apply_started(self, started: Started) -> None:
        now = time.time()
        columns = (started.handle, started.num_cached_tokens, started.queue_s, started.prefill_s)
        for handle, num_cached, queue_s, prefill_s in zip(
            *(column.tolist() for column in columns), strict=False
        ):
            child = self._children.get(handle)
            if child is None:
                continue
            request, stats = child.request, child.request.stats
            self.first_token_s.observe(now - stats.arrival_time)
            if request.num_cached_tokens is None:
                request.num_cached_tokens = num_cached
                stats.queue_s, stats.prefill_s = queue_s, prefill_s
                stats.first_token_latency = now - stats.arrival_time
        self.first_token_s.fold()

    def _apply_prompt_logprobs(self, outputs: StepOutputs) -> None:
        columns = outputs.prompt_logprobs
        assert columns is not None
        for i, handle in enumerate(columns.key.tolist()):
            child = self._children.get(handle)
            reader = child.request.prompt_reader if child is not None else None
            if child is None or reader is None:
                continue
            request = child.request
            assert request.prompt_logprobs is not None
            if not reader.prompt(columns, i, request.prompt_logprobs, len(request.prompt_token_ids)):
                self._malformed(outputs)
                return

    # ---- what should not happen

    def _misplaced(self, child: Child, first: int, num_tokens: int, finish: int) -> None:
        """Tokens that do not follow on the last: all known already (dropped), or with a gap (a fault)."""
        count = len(child.token_ids)
        if first > count:
            self._fault(child, f"lost tokens: {count} came, the next was number {first}")
            return
        self.num_dropped_tokens += num_tokens
        if finish and first + num_tokens == count:
            self._advance(child, finish)
            if child.wake_at < 0:
                child.request.wake()

    def _fault(self, child: Child, problem: str) -> None:
        request = child.request
        logger.error("request %s %s", request.request_id, problem)
        handles = [c.handle for c in request.children if not c.finish]
        self.fail(request, RequestError(request.request_id, problem))
        self._abort(handles, Finish.ABORT)

    def _malformed(self, outputs: StepOutputs) -> None:
        self.num_malformed += 1
        logger.error("outputs of step %d dropped: their columns contradict each other", outputs.step)


def _rows_by_key(key: np.ndarray[Any, Any]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, handle in enumerate(key.tolist()):
        rows.setdefault(handle, []).append(row)
    return rows
