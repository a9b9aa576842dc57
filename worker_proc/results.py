"""Results on their way from the device to the core.

On a CPU a result is there when the step has run, and leaves at once. On a GPU its columns are copied into pinned
buffers behind the step, and a thread that waits for the copy (`device_results.py`) sends them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tercet.ipc.messages import Finish, Logprobs, PromptLogprobs, RowErrors, StepResult
from tercet.ops.logprobs import LogprobColumns
from tercet.worker_proc.sampler import LogprobTensors, SampleResult

Deliver = Callable[[StepResult], None]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of prompt positions [start, start + t) of a row."""

    row: int
    start: int
    columns: LogprobColumns


@dataclass(frozen=True, slots=True)
class PendingResult:
    """A launched step: host columns, and device tensors that will hold its outcome."""

    epoch: int
    step: int
    rows: IntArray
    gens: IntArray
    sampled: SampleResult | None
    frozen: Tensor
    prompt_scores: list[PromptScores]
    received_s: float
    launched_s: float


def columns_to_host(columns: LogprobColumns) -> LogprobColumns:
    """The same on their way to the host: to be read when the device has come that far."""
    return LogprobColumns(_pinned(columns.token_ids), _pinned(columns.logprobs), _pinned(columns.rank))


def _pinned(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return buffer.copy_(tensor, non_blocking=True)


def read_result(pending: PendingResult) -> StepResult:
    """The message of a step whose tensors are on the host. Frozen and broken rows have no token."""
    nothing = np.zeros(0, np.int32)
    row, gen, token, finish = pending.rows[:0], pending.gens[:0], nothing, nothing.astype(np.uint8)
    errors = logprobs = None
    if pending.sampled is not None:
        sampled = pending.sampled
        # Copies: the buffers that these are views of carry another step soon.
        finish = sampled.finish_B.numpy().astype(np.uint8)
        keep = (pending.frozen.numpy() == 0) & (finish != Finish.ERROR)
        errors = _row_errors(pending, sampled.bad_B.numpy() != 0)
        row, gen, token, finish = pending.rows, pending.gens, sampled.token_B.numpy().copy(), finish
        if sampled.logprobs is not None:
            logprobs = _logprobs(sampled.logprobs, keep)
        if not keep.all():
            row, gen, token, finish = row[keep], gen[keep], token[keep], finish[keep]
    return StepResult(
        epoch=pending.epoch,
        step=pending.step,
        row=row,
        gen=gen,
        token=token,
        finish=finish,
        logprobs=logprobs,
        prompt_logprobs=_prompt_logprobs(pending.prompt_scores) if pending.prompt_scores else None,
        row_errors=errors,
        host_us=(pending.launched_s - pending.received_s) * 1e6,
        step_us=(time.perf_counter() - pending.received_s) * 1e6,
    )


def _row_errors(pending: PendingResult, bad: npt.NDArray[np.bool_]) -> RowErrors | None:
    if not bad.any():
        return None
    problem = "the model's logits are not finite, or every token is masked"
    rows = pending.rows[bad]
    return RowErrors(row=rows, gen=pending.gens[bad], message=[problem] * len(rows))


def _logprobs(tensors: LogprobTensors, keep: npt.NDArray[np.bool_]) -> Logprobs:
    kept = keep[tensors.position_b.cpu().numpy()]
    columns = tensors.columns
    return Logprobs(
        key=tensors.rows[kept].astype(np.int32),
        token_ids=columns.token_ids.numpy()[kept],
        logprobs=columns.logprobs.numpy()[kept],
        rank=columns.rank.numpy()[kept],
    )


def _prompt_logprobs(scores: list[PromptScores]) -> PromptLogprobs:
    """Rows may have asked for different numbers of entries: narrower ones are padded with token -1."""
    width = max(score.columns.token_ids.shape[1] for score in scores)
    lengths = [len(score.columns.rank) for score in scores]
    total = sum(lengths)
    token_ids = np.full((total, width), -1, np.int32)
    logprobs = np.full((total, width), -np.inf, np.float32)
    offset = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    for i, score in enumerate(scores):
        part, own = slice(offset[i], offset[i + 1]), score.columns.token_ids.shape[1]
        token_ids[part, :own] = score.columns.token_ids.numpy()
        logprobs[part, :own] = score.columns.logprobs.numpy()
    return PromptLogprobs(
        key=np.array([score.row for score in scores], np.int32),
        start=np.array([score.start for score in scores], np.int32),
        offset=offset,
        token_ids=token_ids,
        logprobs=logprobs,
        rank=np.concatenate([score.columns.rank.numpy() for score in scores]),
    )
