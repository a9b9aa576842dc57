"""What a frontend that does not read has yet to be told, merged: tokens by request, not by step.

While its socket is full, the outputs of steps are gathered in a *segment* and, once the segment is large enough,
merged into one columnar message. A token is so touched twice, however long the frontend sleeps, no merge takes
longer than that of one segment, and what waits costs some 4 bytes a token. Other messages keep their places.

    steps    (a b c) (a b) Reply (a b) (a)   ──▶   (aa bb c) Reply (aaa b)... one entry per request
"""

from __future__ import annotations

from collections import deque
from typing import Final

import msgspec
import numpy as np

from tercet.ipc.messages import Logprobs, PromptLogprobs, RequestFailed, Started, StepOutputs

SEGMENT_STEPS: Final = 512
SEGMENT_BYTES: Final = 256 * 1024
"""A segment is merged at this size: about 12,000 tokens without log-probabilities, in some 2 ms."""

_STEP_BYTES: Final = 800  # of a StepOutputs and its array objects, beside their data
_FAILURE_BYTES: Final = 256
_MESSAGE_BYTES: Final = 1024  # a Reply with Stats, the largest of what is not outputs
_NOTHING: Final = -1  # token id that fills rows of log-probabilities up to the widest


class Backlog:
    """Messages for one frontend, in order. `num_bytes` is what they hold in memory, about."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._ready: deque[tuple[msgspec.Struct, int]] = deque()  # with their sizes
        self._steps: list[StepOutputs] = []  # the open segment: after all that is ready
        self._steps_bytes = 0

    def __len__(self) -> int:
        """Messages that wait, the open segment counted by its steps."""
        return len(self._ready) + len(self._steps)

    def put(self, message: msgspec.Struct) -> None:
        """Add a message. What it costs does not depend on how much waits already."""
        if isinstance(message, StepOutputs):
            if self._steps and not _is_mergeable(self._steps[-1], message):
                self._seal()
            self._steps.append(message)
            size = _size(message)
            self._steps_bytes += size
            self.num_bytes += size
            if len(self._steps) >= SEGMENT_STEPS or self._steps_bytes >= SEGMENT_BYTES:
                self._seal()
        else:
            self._seal()
            self._append(message)

    def first(self) -> msgspec.Struct | None:
        """The message to send next, None where nothing waits. It stays until `pop`."""
        if not self._ready:
            self._seal()
        return self._ready[0][0] if self._ready else None

    def pop(self) -> None:
        """Forget the message that `first` gave: it was sent."""
        _, size = self._ready.popleft()
        self.num_bytes -= size

    def _append(self, message: msgspec.Struct) -> None:
        size = _size(message)
        self._ready.append((message, size))
        self.num_bytes += size

    def _seal(self) -> None:
        """Merge the open segment."""
        if self._steps:
            self.num_bytes -= self._steps_bytes
            steps, self._steps, self._steps_bytes = self._steps, [], 0
            for message in merge(steps):
                self._append(message)


def merge(steps: list[StepOutputs]) -> list[StepOutputs]:
    """The outputs of consecutive steps as one message, with one entry per request.

    More than one message only where a handle was given to a new request between the steps: log-probabilities
    name their request by its handle alone. A reader that applies the result finds each request as if it had
    applied the steps one by one.
    """
    if len(steps) == 1:
        return steps
    columns = _Columns(steps)
    if columns.names_two_requests_alike():
        half = len(steps) // 2
        return merge(steps[:half]) + merge(steps[half:])
    last = steps[-1]
    return [
        StepOutputs(
            epoch=last.epoch,
            step=last.step,
            handle=columns.handle[columns.starts],
            first_index=columns.first_index[columns.starts],
            token=columns.tokens(),
            finish=columns.finish[columns.ends],
            offset=columns.offset(),
            weight_version=last.weight_version,
            logprobs=_merge_logprobs([s.logprobs for s in steps if s.logprobs is not None]),
            prompt_logprobs=_merge_prompt_logprobs(
                [s.prompt_logprobs for s in steps if s.prompt_logprobs is not None]
            ),
            started=_merge_started([s.started for s in steps if s.started is not None]),
        )
    ]


class _Columns:
    """Entries of several steps, those of one request side by side and in their order.

    `starts` and `ends` are the first and the last entry of each request.
    """

    def __init__(self, steps: list[StepOutputs]) -> None:
        self._steps = steps
        handle = np.concatenate([s.handle for s in steps])
        order = np.argsort(handle, kind="stable")
        self.handle = handle[order]
        self.first_index = np.concatenate([s.first_index for s in steps])[order]
        self.finish = np.concatenate([s.finish for s in steps])[order]
        counts = np.concatenate([_counts(s) for s in steps])
        self._count = counts[order]
        self._begin = (np.cumsum(counts) - counts)[order]  # in the tokens, as they came
        self._step = np.repeat(np.arange(len(steps)), [len(s.handle) for s in steps])[order]
        new = np.ones(len(handle), np.bool_)
        new[1:] = self.handle[1:] != self.handle[:-1]
        self._new = new
        self.starts = new.nonzero()[0]
        self.ends = np.append(self.starts[1:], len(handle)) - 1 if len(handle) else self.starts

    def names_two_requests_alike(self) -> bool:
        """Whether some entry of a handle does not go on where the one before it stopped."""
        follows = ~self._new[1:]
        next_index = self.first_index[:-1] + self._count[:-1]
        broken = follows & ((self.first_index[1:] != next_index) | (self.finish[:-1] != 0))
        if broken.any():
            return True
        return any(self._begins_late(i, s) for i, s in enumerate(self._steps))

    def _begins_late(self, index: int, step: StepOutputs) -> bool:
        """Whether what comes before a request's first token names a handle that had tokens before."""
        parts = [step.started.handle] if step.started is not None else []
        parts += [step.prompt_logprobs.key] if step.prompt_logprobs is not None else []
        return any(self._is_older(index, key) for key in parts)

    def _is_older(self, index: int, key: np.ndarray) -> bool:
        if not len(self.handle):
            return False
        at = np.minimum(np.searchsorted(self.handle, key), len(self.handle) - 1)
        return bool(((self.handle[at] == key) & (self._step[at] < index)).any())

    def offset(self) -> np.ndarray:
        """i32[requests + 1], where the tokens of each request begin in `tokens`."""
        ends = np.cumsum(self._count)[self.ends]
        return np.concatenate(([0], ends)).astype(np.int32)

    def tokens(self) -> np.ndarray:
        """i32[t], the tokens of all requests, one request after the other."""
        token = np.concatenate([s.token for s in self._steps])
        place = np.cumsum(self._count) - self._count
        index = np.arange(len(token)) + np.repeat(self._begin - place, self._count)
        merged: np.ndarray = token[index]
        return merged


def _counts(step: StepOutputs) -> np.ndarray:
    """Tokens of each entry."""
    return np.ones(len(step.handle), np.int64) if step.offset is None else np.diff(step.offset)


def _is_mergeable(before: StepOutputs, after: StepOutputs) -> bool:
    return (
        before.epoch == after.epoch
        and before.weight_version == after.weight_version
        and before.pooled is None
        and after.pooled is None
    )


def _merge_logprobs(parts: list[Logprobs]) -> Logprobs | None:
    if not parts:
        return None
    width = max(part.token_ids.shape[1] for part in parts)
    return Logprobs(
        key=np.concatenate([part.key for part in parts]),
        token_ids=np.concatenate([_widen(part.token_ids, width, _NOTHING) for part in parts]),
        logprobs=np.concatenate([_widen(part.logprobs, width, -np.inf) for part in parts]),
        rank=np.concatenate([part.rank for part in parts]),
    )


def _merge_prompt_logprobs(parts: list[PromptLogprobs]) -> PromptLogprobs | None:
    if not parts:
        return None
    width = max(part.token_ids.shape[1] for part in parts)
    counts = np.concatenate([np.diff(part.offset) for part in parts])
    return PromptLogprobs(
        key=np.concatenate([part.key for part in parts]),
        start=np.concatenate([part.start for part in parts]),
        offset=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        token_ids=np.concatenate([_widen(part.token_ids, width, _NOTHING) for part in parts]),
        logprobs=np.concatenate([_widen(part.logprobs, width, -np.inf) for part in parts]),
        rank=np.concatenate([part.rank for part in parts]),
    )


def _merge_started(parts: list[Started]) -> Started | None:
    if not parts:
        return None
    return Started(
        handle=np.concatenate([part.handle for part in parts]),
        num_cached_tokens=np.concatenate([part.num_cached_tokens for part in parts]),
        queue_s=np.concatenate([part.queue_s for part in parts]),
        prefill_s=np.concatenate([part.prefill_s for part in parts]),
    )


def _widen(columns: np.ndarray, width: int, fill: float) -> np.ndarray:
    """[t, k] as [t, width]: readers cut what a request did not ask for."""
    if columns.shape[1] == width:
        return columns
    wide = np.full((len(columns), width), fill, columns.dtype)
    wide[:, : columns.shape[1]] = columns
    return wide


def _size(message: msgspec.Struct) -> int:
    """Bytes that a message holds in memory, about."""
    if isinstance(message, StepOutputs):
        columns = [message.handle, message.first_index, message.token, message.finish, message.offset]
        size = _STEP_BYTES + sum(column.nbytes for column in columns if column is not None)
        for part in (message.logprobs, message.prompt_logprobs):
            if part is not None:
                size += part.key.nbytes + part.token_ids.nbytes + part.logprobs.nbytes + part.rank.nbytes
        return size
    return _FAILURE_BYTES if isinstance(message, RequestFailed) else _MESSAGE_BYTES
