"""What a frontend reads after a sleep is what it would have read awake, in fewer messages."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from typing import Any

import msgspec
import numpy as np
import pytest

from tercet.core_proc import backlog as backlog_module
from tercet.core_proc.backlog import SEGMENT_STEPS, Backlog, merge
from tercet.ipc.messages import (
    Finish,
    Logprobs,
    PromptLogprobs,
    Reply,
    RequestFailed,
    Started,
    StepOutputs,
)
from tests.conftest import FULL

NUM_HISTORIES = 10_000 if FULL else 400
NUM_HANDLES = 5  # few, so that one is soon given to another request


class Reader:
    """Applies messages as a frontend does, and books what each handle sees, in order."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Any]] = defaultdict(list)
        self.num_tokens = 0
        self.replies: list[tuple[int, int]] = []  # with the tokens that came before each

    def read(self, message: msgspec.Struct | None) -> None:
        match message:
            case StepOutputs():
                self._read_outputs(message)
            case RequestFailed(handle=handle, code=code):
                self.seen[handle].append(("failed", code))
            case Reply(call_id=call_id):
                self.replies.append((call_id, self.num_tokens))

    def _read_outputs(self, message: StepOutputs) -> None:
        assert message.first_index.dtype == message.token.dtype == np.int32
        assert message.handle.dtype == np.uint64 and message.finish.dtype == np.uint8
        handles = message.handle.tolist()
        # Neither depends on the other: their order in one message says nothing.
        self._read_prompt_logprobs(message.prompt_logprobs)
        if (s := message.started) is not None:
            for handle, cached in zip(s.handle.tolist(), s.num_cached_tokens.tolist(), strict=True):
                self.seen[handle].append(("started", cached))
        rows = defaultdict(list)
        if message.logprobs is not None:
            assert len(set(handles)) == len(handles), "whose log-probabilities are these?"
            for handle, row in zip(message.logprobs.key.tolist(), _rows(message.logprobs), strict=True):
                rows[handle].append(row)
        offset = range(len(handles) + 1) if message.offset is None else message.offset.tolist()
        assert offset[0] == 0 and offset[-1] == len(message.token)
        for i, handle in enumerate(handles):
            tokens = message.token[offset[i] : offset[i + 1]].tolist()
            found = rows[handle] or [None] * len(tokens)
            first = int(message.first_index[i])
            for j, (token, row) in enumerate(zip(tokens, found, strict=True)):
                self.seen[handle].append(("token", first + j, token, row, message.weight_version))
            if message.finish[i]:
                self.seen[handle].append(("finish", first + len(tokens), int(message.finish[i])))
        self.num_tokens += len(message.token)

    def _read_prompt_logprobs(self, part: PromptLogprobs | None) -> None:
        if part is None:
            return
        rows = _rows(part)
        for i, handle in enumerate(part.key.tolist()):
            begin, end = part.offset[i], part.offset[i + 1]
            for j, row in enumerate(rows[begin:end]):
                self.seen[handle].append(("prompt", int(part.start[i]) + j, row))


def _rows(part: Logprobs | PromptLogprobs) -> list[Any]:
    """Each row without the filling of a batch of several widths."""
    rows = []
    columns = (part.token_ids.tolist(), part.logprobs.tolist(), part.rank.tolist())
    for ids, values, rank in zip(*columns, strict=True):
        kept = [(i, v) for i, v in zip(ids, values, strict=True) if i >= 0]
        assert all(v == -np.inf for i, v in zip(ids, values, strict=True) if i < 0)
        rows.append((kept, rank))
    return rows


class Writer:
    """Draws what a core sends to one frontend: steps, and now and then something else."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.live: dict[int, dict[str, Any]] = {}
        self.number = 0  # every token, row and reply is told apart by it
        self.weight_version = 0

    def next(self) -> msgspec.Struct:
        rng = self.rng
        what = rng.random()
        if what < 0.03:
            return Reply(epoch=1, call_id=self._number())
        if what < 0.06 and self.live:
            handle = rng.choice(list(self.live))
            del self.live[handle]
            return RequestFailed(epoch=1, handle=handle, code=str(self._number()), message="")
        if what < 0.08 and self.live:  # aborted by its frontend: nothing more comes
            del self.live[rng.choice(list(self.live))]
        if what > 0.99:
            self.weight_version += 1
        for handle in range(NUM_HANDLES):
            if handle not in self.live and rng.random() < 0.2:
                count = rng.choice([0, 0, 0, 7])  # of outputs that it had before it was resumed
                self.live[handle] = {
                    "count": count,
                    "started": False,
                    "scored": rng.choice([0, 0, 3]),
                    "width": rng.choice([0, 0, 1, 4]),
                }
        return self._step()

    def _number(self) -> int:
        self.number += 1
        return self.number

    def _row(self, width: int) -> tuple[list[int], list[float], int]:
        ids = [self._number() for _ in range(width)]
        return ids, [-float(i) for i in ids], self._number()

    def _step(self) -> StepOutputs:
        entries, logprobs, started, scored = [], [], [], []
        for handle, state in list(self.live.items()):
            if self.rng.random() < 0.3:
                continue
            if state["scored"]:
                scored.append((handle, 4 - state["scored"], self._row(2)))
                state["scored"] -= 1
                continue
            count = self.rng.choice([1, 1, 1, 2, 0])
            finish = self.rng.choice([0] * 12 + [Finish.EOS, Finish.LENGTH, Finish.ABORT])
            if not count and not finish:
                continue
            if count and not state["started"]:
                started.append((handle, self._number()))
                state["started"] = True
            tokens = [self._number() for _ in range(count)]
            entries.append((handle, state["count"], tokens, finish))
            logprobs += [(handle, self._row(state["width"])) for _ in tokens if state["width"]]
            state["count"] += count
            if finish:
                del self.live[handle]
        self.rng.shuffle(entries)
        return self._message(entries, logprobs, started, scored)

    def _message(self, entries: Any, logprobs: Any, started: Any, scored: Any) -> StepOutputs:
        counts = [len(tokens) for _, _, tokens, _ in entries]
        offset = None if set(counts) <= {1} else np.cumsum([0, *counts]).astype(np.int32)
        return StepOutputs(
            epoch=1,
            step=self._number(),
            handle=np.array([e[0] for e in entries], np.uint64),
            first_index=np.array([e[1] for e in entries], np.int32),
            token=np.array([token for e in entries for token in e[2]], np.int32),
            finish=np.array([e[3] for e in entries], np.uint8),
            offset=offset,
            weight_version=self.weight_version,
            logprobs=self._logprobs(logprobs),
            prompt_logprobs=self._prompt_logprobs(scored),
            started=Started(
                handle=np.array([s[0] for s in started], np.uint64),
                num_cached_tokens=np.array([s[1] for s in started], np.int32),
                queue_s=np.zeros(len(started), np.float32),
                prefill_s=np.zeros(len(started), np.float32),
            )
            if started
            else None,
        )

    def _logprobs(self, entries: Any) -> Logprobs | None:
        if not entries:
            return None
        width = max(len(row[0]) for _, row in entries)
        return Logprobs(
            key=np.array([e[0] for e in entries], np.uint64),
            token_ids=np.array([row[0] + [-1] * (width - len(row[0])) for _, row in entries], np.int32),
            logprobs=np.array([row[1] + [-np.inf] * (width - len(row[1])) for _, row in entries], np.float32),
            rank=np.array([row[2] for _, row in entries], np.int32),
        )

    def _prompt_logprobs(self, entries: Any) -> PromptLogprobs | None:
        if not entries:
            return None
        return PromptLogprobs(
            key=np.array([e[0] for e in entries], np.uint64),
            start=np.array([e[1] for e in entries], np.int32),
            offset=np.arange(len(entries) + 1, dtype=np.int32),
            token_ids=np.array([row[0] for _, _, row in entries], np.int32),
            logprobs=np.array([row[1] for _, _, row in entries], np.float32),
            rank=np.array([row[2] for _, _, row in entries], np.int32),
        )


def play(seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """A history through a backlog that is read now and then; returns messages before and after."""
    rng = random.Random(seed)
    monkeypatch.setattr(backlog_module, "SEGMENT_STEPS", rng.choice([1, 2, 7, 50]))
    monkeypatch.setattr(backlog_module, "SEGMENT_BYTES", rng.choice([1000, 5000, 10**9]))
    writer, backlog = Writer(rng), Backlog()
    awake, asleep = Reader(), Reader()
    num_read = 0

    def read_some(count: int) -> None:
        nonlocal num_read
        while count and (message := backlog.first()) is not None:
            assert backlog.first() is message  # nothing comes before what could not be sent
            backlog.pop()
            asleep.read(message)
            num_read, count = num_read + 1, count - 1

    num_messages = rng.randint(1, 120)
    for _ in range(num_messages):
        message = writer.next()
        awake.read(message)
        backlog.put(message)
        assert backlog.num_bytes > 0
        if rng.random() < 0.05:
            read_some(rng.randint(0, 4))
            if rng.random() < 0.5:
                backlog.first()
    read_some(-1)
    assert backlog.num_bytes == 0 and len(backlog) == 0
    assert asleep.seen == awake.seen
    assert asleep.replies == awake.replies
    return num_messages, num_read


def test_what_is_merged_reads_as_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    total = merged = 0
    for seed in range(NUM_HISTORIES):
        try:
            before, after = play(seed, monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"play({seed}): {error}") from error
        total, merged = total + before, merged + after
    assert merged < 0.75 * total


def step(handles: list[int], index: int, *, finish: int = 0, **changes: Any) -> StepOutputs:
    n = len(handles)
    message = StepOutputs(
        epoch=1,
        step=index,
        handle=np.array(handles, np.uint64),
        first_index=np.full(n, index, np.int32),
        token=np.arange(n, dtype=np.int32) + 1000 * index,
        finish=np.full(n, finish, np.uint8),
    )
    return msgspec.structs.replace(message, **changes)


def test_steps_become_one_entry_per_request() -> None:
    (merged,) = merge(
        [step([5, 3], 0), step([3], 1), step([3, 5], 2, first_index=np.array([2, 1], np.int32))]
    )
    assert merged.handle.tolist() == [3, 5]
    assert merged.offset is not None and merged.offset.tolist() == [0, 3, 5]
    assert merged.token.tolist() == [1, 1000, 2000, 0, 2001]
    assert merged.first_index.tolist() == [0, 0] and merged.finish.tolist() == [0, 0]
    assert merged.step == 2


@pytest.mark.parametrize("plant", ["a token goes missing", "an end goes missing", "rows are mixed up"])
def test_the_reader_sees_a_wrong_merge(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(steps: list[StepOutputs]) -> list[StepOutputs]:
        first, *others = merge(steps)
        if plant == "a token goes missing" and len(first.token) > 1:
            first = msgspec.structs.replace(first, token=np.roll(first.token, 1))
        elif plant == "an end goes missing":
            first = msgspec.structs.replace(first, finish=np.zeros_like(first.finish))
        elif plant == "rows are mixed up" and first.logprobs is not None:
            logprobs = msgspec.structs.replace(first.logprobs, key=np.roll(first.logprobs.key, 1))
            first = msgspec.structs.replace(first, logprobs=logprobs)
        return [first, *others]

    monkeypatch.setattr(backlog_module, "merge", wrong)
    with pytest.raises((AssertionError, ValueError)):  # noqa: PT012  (some history shows it)
        for seed in range(50):
            play(seed, monkeypatch)


def count_calls(num_steps: int) -> int:
    """Python calls for so many steps of 64 requests, read in the end."""
    backlog = Backlog()
    messages = [step(list(range(64)), i) for i in range(num_steps)]
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for message in messages:
            backlog.put(message)
        while backlog.first() is not None:
            backlog.pop()
    finally:
        sys.setprofile(None)
    return calls


def test_cost_grows_with_what_arrives_and_not_faster() -> None:
    few, many = count_calls(2 * SEGMENT_STEPS), count_calls(16 * SEGMENT_STEPS)
    assert many < 8.5 * few


def test_what_waits_costs_little_more_than_its_tokens() -> None:
    backlog = Backlog()
    num_steps = 8 * SEGMENT_STEPS
    for i in range(num_steps):
        backlog.put(step(list(range(64)), i))
    tokens = 64 * num_steps
    assert 4 * tokens <= backlog.num_bytes < 8 * tokens + backlog_module.SEGMENT_BYTES
    sizes = []
    while (message := backlog.first()) is not None:
        assert isinstance(message, StepOutputs)
        sizes.append(len(message.token))
        backlog.pop()
    assert sum(sizes) == tokens and len(sizes) < num_steps / 50
