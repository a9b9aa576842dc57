"""Applying a step's result: columns from the worker become columns for the frontends.

All rows at once; Python per row only for one that ends, gives its first token, or whose request has left the
row since the plan was sent (a *stale* entry: dropped if the request is gone, counted if it was preempted).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import msgspec
import numpy as np

from tercet.core_proc.request import Request
from tercet.core_proc.scheduler import Scheduler
from tercet.ipc.messages import (
    Finish,
    Logprobs,
    PromptLogprobs,
    RequestFailed,
    RowErrors,
    Started,
    StepOutputs,
    StepResult,
)

_I32 = np.dtype(np.int32)


class ResultError(Exception):
    """A worker's result contradicts the plan: the worker is at fault and its step cannot be used."""


@dataclass(slots=True)
class _Entries:
    """One entry per sampled token, in the result's order."""

    frontend: np.ndarray  # i32
    handle: np.ndarray  # u64
    first_index: np.ndarray  # i32
    token: np.ndarray  # i32
    finish: np.ndarray  # u8
    keep: np.ndarray  # bool, False for tokens of requests that are gone


@dataclass(slots=True)
class Outgoing:
    """What to send after a step: (frontend, message) pairs."""

    outputs: list[tuple[int, StepOutputs]]
    failures: list[tuple[int, RequestFailed]]


def apply_result(scheduler: Scheduler, result: StepResult, now: float) -> Outgoing:
    """Bring the scheduler's accounts up to date with a step and say what its frontends shall hear.

    Raises:
        ResultError: the result does not belong to the oldest plan in flight, or names rows that do not exist.
    """
    _check(scheduler, result)
    scheduler.applied_step = result.step
    failures = _fail_rows(scheduler, result.row_errors)
    entries = _read_entries(scheduler, result, now)
    started = _read_started(scheduler, result, now)
    logprobs = _rekey(scheduler, result, entries) if result.logprobs is not None else None
    prompt_logprobs = _rekey_prompt(scheduler, result)
    scheduler.counters.generation_tokens += int(np.count_nonzero(entries.keep))
    _finish_rows(scheduler, result, entries)
    _forget_drained(scheduler)
    if not _all(entries.keep):
        entries = _select(entries, entries.keep)
    outputs = _route(scheduler, result.step, entries, started, logprobs, prompt_logprobs)
    return Outgoing(outputs, failures)


def end_outputs(
    scheduler: Scheduler, requests: list[Request], finish: Finish
) -> list[tuple[int, StepOutputs]]:
    """Messages that end these requests without a token, one per frontend."""
    by_frontend: dict[int, list[Request]] = {}
    for request in requests:
        by_frontend.setdefault(request.frontend, []).append(request)
    return [(frontend, _end_message(scheduler, group, finish)) for frontend, group in by_frontend.items()]


def _end_message(scheduler: Scheduler, requests: list[Request], finish: Finish) -> StepOutputs:
    rows = scheduler.rows
    known = [int(rows.known[r.row]) if r.row >= 0 else len(r.token_ids) for r in requests]
    return StepOutputs(
        epoch=scheduler.epoch,
        step=scheduler.applied_step,
        handle=np.array([r.handle for r in requests], np.uint64),
        first_index=np.array([k - r.prompt_len for k, r in zip(known, requests, strict=True)], np.int32),
        token=np.zeros(0, np.int32),
        finish=np.full(len(requests), finish, np.uint8),
        offset=np.zeros(len(requests) + 1, np.int32),
    )


def _check(scheduler: Scheduler, result: StepResult) -> None:
    if result.step != scheduler.applied_step + 1 or result.step > scheduler.step:
        raise ResultError(f"result of step {result.step}; expected {scheduler.applied_step + 1}")
    m = len(result.row)
    if not m == len(result.gen) == len(result.token) == len(result.finish) or result.offset is not None:
        raise ResultError("columns of different lengths")
    if result.row.dtype != _I32:
        raise ResultError(f"rows of {result.row.dtype}")
    # As unsigned numbers, negative ones are out of range too.
    if m and int(np.maximum.reduce(result.row.view(np.uint32))) >= scheduler.rows.num_rows:
        raise ResultError("a row that does not exist")


def _read_entries(scheduler: Scheduler, result: StepResult, now: float) -> _Entries:
    rows = scheduler.rows
    row = result.row.astype(np.intp)  # once, rather than in each of the look-ups below
    known = rows.known.take(row)
    entries = _Entries(
        frontend=rows.frontend.take(row),
        handle=rows.handle.take(row),
        first_index=known - rows.prompt_len.take(row),
        token=result.token,
        finish=result.finish,
        keep=rows.gen.take(row) == result.gen,
    )
    if _all(entries.keep):
        rows.tokens[row, known] = result.token
        rows.known[row] = known + 1
        scheduler.gaps.observe(now - rows.last_token_s.take(row))
        rows.last_token_s[row] = now
    else:
        live = row[entries.keep]
        scheduler.gaps.observe(now - rows.last_token_s[live])
        rows.last_token_s[live] = now
        rows.tokens[live, known[entries.keep]] = result.token[entries.keep]
        rows.known[live] += 1
        for index in np.flatnonzero(~entries.keep).tolist():
            _read_stale(scheduler, result, entries, index, now)
    return entries


def _read_stale(scheduler: Scheduler, result: StepResult, entries: _Entries, index: int, now: float) -> None:
    """A token for a request that has left its row: it counts if the request was preempted."""
    request = scheduler.draining.get((int(result.row[index]), int(result.gen[index])))
    if request is None or not scheduler.is_unfinished(request):
        return
    entries.frontend[index] = request.frontend
    entries.handle[index] = request.handle
    entries.first_index[index] = len(request.token_ids) - request.prompt_len
    entries.keep[index] = True
    request.token_ids = np.append(request.token_ids, result.token[index])
    if request.first_token_s >= 0:
        scheduler.gaps.observe(np.array([now - request.last_token_s]))
        request.last_token_s = now
    if entries.finish[index]:
        scheduler.end(request, Finish(int(entries.finish[index])))
        scheduler.counters.num_finished += 1


def _finish_rows(scheduler: Scheduler, result: StepResult, entries: _Entries) -> None:
    for index in result.finish.nonzero()[0].tolist():
        row = int(result.row[index])
        request = scheduler.rows.requests[row]
        if request is not None and scheduler.rows.gen[row] == result.gen[index]:
            # The device has frozen the row: a step in flight, though planned, leaves its last token out.
            scheduler.rows.computed[row] = scheduler.rows.known[row] - 1
            scheduler.end(request, Finish(int(result.finish[index])))
            scheduler.counters.num_finished += 1


def _forget_drained(scheduler: Scheduler) -> None:
    """Preempted requests whose last result has now been applied need no special reading any more."""
    if scheduler.draining:
        step = scheduler.applied_step
        scheduler.draining = {key: r for key, r in scheduler.draining.items() if r.wait_for_step > step}
    scheduler.scoring.pop(scheduler.applied_step, None)


def _fail_rows(scheduler: Scheduler, errors: RowErrors | None) -> list[tuple[int, RequestFailed]]:
    """End requests whose computation failed; what they left in the cache is void."""
    failures: list[tuple[int, RequestFailed]] = []
    if errors is None:
        return failures
    for row, gen, problem in zip(errors.row.tolist(), errors.gen.tolist(), errors.message, strict=True):
        owner = scheduler.rows.requests[row] if scheduler.rows.gen[row] == gen else None
        request = owner or scheduler.draining.get((row, gen))
        if request is None or not scheduler.is_unfinished(request):
            continue
        blocks = scheduler.rows.blocks_of(row) if owner else []
        scheduler.end(request, Finish.ERROR)
        scheduler.num_corrupted += 1
        scheduler.pool.unpublish([*blocks, *scheduler.pool.find_all(request.hashes)])
        message = RequestFailed(
            epoch=scheduler.epoch, handle=request.handle, code="internal", message=problem
        )
        failures.append((request.frontend, message))
    return failures


def _read_started(scheduler: Scheduler, result: StepResult, now: float) -> dict[int, Started]:
    """Facts about requests whose first token this is, by frontend."""
    rows = scheduler.rows
    if not np.count_nonzero(rows.unstarted):
        return {}
    fresh = rows.unstarted[result.row] & (rows.gen[result.row] == result.gen)
    if not fresh.any():
        return {}
    found: dict[int, list[Request]] = {}
    for row in result.row[fresh].tolist():
        rows.unstarted[row] = False
        request = rows.requests[row]
        assert request is not None
        request.started_sent = True
        request.first_token_s = now
        found.setdefault(request.frontend, []).append(request)
    return {frontend: _started(requests, now) for frontend, requests in found.items()}


def _started(requests: list[Request], now: float) -> Started:
    return Started(
        handle=np.array([r.handle for r in requests], np.uint64),
        num_cached_tokens=np.array([r.num_cached_tokens for r in requests], np.int32),
        queue_s=np.array([r.started_s - r.arrival_s for r in requests], np.float32),
        prefill_s=np.array([now - r.started_s for r in requests], np.float32),
    )


def _rekey(scheduler: Scheduler, result: StepResult, entries: _Entries) -> tuple[np.ndarray, Logprobs]:
    """Logprobs with the index of their entry as key, tokens of gone requests cut."""
    columns = result.logprobs
    assert columns is not None
    entry_of_row = np.full(scheduler.rows.num_rows, -1, np.int32)
    entry_of_row[result.row] = np.arange(len(result.row), dtype=np.int32)
    index = entry_of_row[columns.key]
    if (index < 0).any():
        raise ResultError("logprobs of a row without a token")
    keep = entries.keep[index]
    index = index[keep]
    return entries.frontend[index], Logprobs(
        key=entries.handle[index],
        token_ids=columns.token_ids[keep],
        logprobs=columns.logprobs[keep],
        rank=columns.rank[keep],
    )


def _rekey_prompt(scheduler: Scheduler, result: StepResult) -> list[tuple[int, PromptLogprobs]]:
    """Prompt logprobs, one message part per request: they are rare and large."""
    columns = result.prompt_logprobs
    if columns is None:
        return []
    owners = scheduler.scoring.get(result.step, {})
    found = []
    for i, row in enumerate(columns.key.tolist()):
        request = owners.get(row)
        if request is None or not scheduler.is_unfinished(request):
            continue
        start, stop = int(columns.offset[i]), int(columns.offset[i + 1])
        request.prompt_logprobs_from = int(columns.start[i]) + stop - start
        part = PromptLogprobs(
            key=np.array([request.handle], np.uint64),
            start=columns.start[i : i + 1],
            offset=np.array([0, stop - start], np.int32),
            token_ids=columns.token_ids[start:stop],
            logprobs=columns.logprobs[start:stop],
            rank=columns.rank[start:stop],
        )
        found.append((request.frontend, part))
    return found


def _route(
    scheduler: Scheduler,
    step: int,
    entries: _Entries,
    started: dict[int, Started],
    logprobs: tuple[np.ndarray, Logprobs] | None,
    prompt_logprobs: list[tuple[int, PromptLogprobs]],
) -> list[tuple[int, StepOutputs]]:
    """One message per frontend that has tokens in the step."""
    frontend = entries.frontend
    if not len(frontend):
        groups: list[tuple[int, _Entries]] = []
    elif _all(frontend == frontend[0]):
        groups = [(int(frontend[0]), entries)]
    else:
        groups = [(int(f), _select(entries, frontend == f)) for f in np.unique(frontend)]
    outputs = {f: _message(scheduler, step, group, started.get(f)) for f, group in groups}
    if logprobs is not None:
        owner, columns = logprobs
        for f in np.unique(owner).tolist():
            mask = owner == f
            part = Logprobs(
                key=columns.key[mask],
                token_ids=columns.token_ids[mask],
                logprobs=columns.logprobs[mask],
                rank=columns.rank[mask],
            )
            outputs[f] = msgspec.structs.replace(outputs[f], logprobs=part)
    scored = [(f, _scored(scheduler, step, part)) for f, part in prompt_logprobs]
    return [*scored, *outputs.items()]  # what scores the prompt comes before its first token


def _message(scheduler: Scheduler, step: int, entries: _Entries, started: Started | None) -> StepOutputs:
    return StepOutputs(
        epoch=scheduler.epoch,
        step=step,
        handle=entries.handle,
        first_index=entries.first_index,
        token=entries.token,
        finish=entries.finish,
        started=started,
    )


def _scored(scheduler: Scheduler, step: int, part: PromptLogprobs) -> StepOutputs:
    nothing = np.zeros(0, np.int32)
    return StepOutputs(
        epoch=scheduler.epoch,
        step=step,
        handle=nothing.astype(np.uint64),
        first_index=nothing,
        token=nothing,
        finish=nothing.astype(np.uint8),
        prompt_logprobs=part,
    )


def _select(entries: _Entries, mask: np.ndarray) -> _Entries:
    return replace(
        entries,
        frontend=entries.frontend[mask],
        handle=entries.handle[mask],
        first_index=entries.first_index[mask],
        token=entries.token[mask],
        finish=entries.finish[mask],
        keep=entries.keep[mask],
    )


def _all(mask: np.ndarray) -> bool:
    """As `mask.all()`, at a fifth of its cost for the sizes of a batch."""
    return bool(np.count_nonzero(mask) == len(mask))
