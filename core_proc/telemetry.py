"""What the core counts: steps, requests, and the totals of what its frontends have counted.

The steps write a few numbers into a ring each; histograms are made of them when somebody asks, or when the ring
is half full. Nothing here runs per token.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from tercet import histogram
from tercet.core_proc.request import Request
from tercet.histogram import Histogram
from tercet.ipc.messages import Finish, StepResult
from tercet.ipc.telemetry import Series, StepTimes

RING_STEPS: Final = 1024  # that the core remembers
_FOLD_STEPS: Final = RING_STEPS // 2
_SCHEDULE, _LAUNCH, _WAIT, _OUTPUT, _TIME, _TOKENS, _DECODES, _WIDTH = range(8)
_PHASES: Final = {"schedule": _SCHEDULE, "launch": _LAUNCH, "wait": _WAIT, "output": _OUTPUT}

_REASONS: Final = {
    Finish.EOS: "stop",
    Finish.STOP_TOKEN: "stop",
    Finish.LENGTH: "length",
    Finish.ABORT: "abort",
    Finish.ERROR: "error",
}


def counter(name: str, value: int, **labels: str) -> Series:
    """A counter that stands at `value`."""
    return Series(name=name, bounds=np.zeros(0), counts=np.array([value], np.int64), labels=labels)


def series_of(name: str, values: Histogram, **labels: str) -> Series:
    """A histogram as it stands."""
    return Series(name=name, bounds=values.bounds, counts=values.counts, total=values.total, labels=labels)


class StepLog:
    """Times of the last `RING_STEPS` steps, and histograms over all."""

    def __init__(self) -> None:
        self._ring = array("d", bytes(8 * RING_STEPS * _WIDTH))
        self._folded = 0  # last step in the histograms
        self._ended = 0  # last step whose outputs were sent
        self._phases = {name: Histogram(histogram.PAUSE_S) for name in _PHASES}
        self._tokens = Histogram(histogram.STEP_TOKENS)

    def planned(self, step: int, schedule_s: float, num_tokens: int, num_decodes: int) -> None:
        """A plan was sent."""
        ring, at = self._ring, step % RING_STEPS * _WIDTH
        ring[at + _SCHEDULE] = schedule_s
        ring[at + _TOKENS] = num_tokens
        ring[at + _DECODES] = num_decodes

    def ended(self, result: StepResult, output_s: float) -> None:
        """A result was applied and its outputs were sent."""
        step = result.step
        ring, at = self._ring, step % RING_STEPS * _WIDTH
        ring[at + _LAUNCH] = result.host_us * 1e-6
        ring[at + _WAIT] = (result.step_us - result.host_us) * 1e-6
        ring[at + _OUTPUT] = output_s
        ring[at + _TIME] = time.time()
        self._ended = step
        if step - self._folded >= _FOLD_STEPS:
            self._fold()

    def _rows(self, after: int) -> tuple[np.ndarray, np.ndarray]:
        """i64[m] steps after this one that have ended, and f64[m, _WIDTH] what is known of them."""
        first = max(after, self._ended - RING_STEPS + 2, 0) + 1  # two more may be in flight, in the same ring
        steps = np.arange(first, self._ended + 1, dtype=np.int64)
        table = np.frombuffer(self._ring, np.float64).reshape(RING_STEPS, _WIDTH)
        return steps, table[steps % RING_STEPS]

    def _fold(self) -> None:
        _, rows = self._rows(self._folded)
        for name, column in _PHASES.items():
            self._phases[name].observe_many(rows[:, column])
        self._tokens.observe_many(rows[:, _TOKENS])
        self._folded = self._ended

    def series(self) -> Iterator[Series]:
        """Histograms over all steps."""
        self._fold()
        yield series_of("iteration_tokens_total", self._tokens)
        for name, values in self._phases.items():
            yield series_of("step_phase_seconds", values, phase=name)

    def times(self, after: int) -> StepTimes:
        """Steps after this one, as far as they are remembered."""
        steps, rows = self._rows(after)
        us = (rows * 1e6).astype(np.float32)
        return StepTimes(
            step=steps,
            time_s=rows[:, _TIME].copy(),
            schedule_us=us[:, _SCHEDULE].copy(),
            launch_us=us[:, _LAUNCH].copy(),
            wait_us=us[:, _WAIT].copy(),
            output_us=us[:, _OUTPUT].copy(),
            num_tokens=rows[:, _TOKENS].astype(np.int32),
            num_decodes=rows[:, _DECODES].astype(np.int32),
        )


class RequestLog:
    """Histograms over the requests that have ended, each of n children counted as one, as vLLM does."""

    def __init__(self, max_model_len: int) -> None:
        lengths = histogram.steps_of_1_2_5(max_model_len)
        self._reasons = Counter(dict.fromkeys(_REASONS.values(), 0))
        self._histograms = {
            "request_queue_time_seconds": Histogram(histogram.REQUEST_S),
            "request_prefill_time_seconds": Histogram(histogram.REQUEST_S),
            "request_decode_time_seconds": Histogram(histogram.REQUEST_S),
            "request_inference_time_seconds": Histogram(histogram.REQUEST_S),
            "request_time_per_output_token_seconds": Histogram(histogram.PER_TOKEN_S),
            "request_prompt_tokens": Histogram(lengths),
            "request_generation_tokens": Histogram(lengths),
            "request_max_num_generation_tokens": Histogram(lengths),
            "request_params_n": Histogram(histogram.CHILDREN),
            "request_params_max_tokens": Histogram(lengths),
            "request_num_preemptions": Histogram(histogram.PREEMPTIONS),
            "request_prefill_kv_computed_tokens": Histogram(lengths),
        }

    def ended(self, request: Request, finish: Finish) -> None:
        """A request has left the scheduler for good."""
        observe = {name: values.observe for name, values in self._histograms.items()}
        self._reasons[_REASONS[finish]] += 1
        prompt, num_tokens = request.prompt, len(request.token_ids) - request.prompt_len
        observe["request_prompt_tokens"](request.prompt_len)
        observe["request_generation_tokens"](num_tokens)
        observe["request_params_max_tokens"](request.sampling.max_tokens)
        observe["request_num_preemptions"](request.num_preemptions)
        prompt.num_ended += 1
        prompt.longest_output = max(prompt.longest_output, num_tokens)
        if prompt.num_ended == len(prompt.message.seeds):
            observe["request_params_n"](prompt.num_ended)
            observe["request_max_num_generation_tokens"](prompt.longest_output)
        if request.first_token_s >= 0:
            self._observe_times(request, num_tokens)
        for values in self._histograms.values():
            values.fold()

    def _observe_times(self, request: Request, num_tokens: int) -> None:
        histograms = self._histograms
        decode_s = request.last_token_s - request.first_token_s
        prefill_s = request.first_token_s - request.started_s
        histograms["request_queue_time_seconds"].observe(request.started_s - request.arrival_s)
        histograms["request_prefill_time_seconds"].observe(prefill_s)
        histograms["request_decode_time_seconds"].observe(decode_s)
        histograms["request_inference_time_seconds"].observe(prefill_s + decode_s)
        computed = request.prompt_len - max(request.num_cached_tokens, 0)
        histograms["request_prefill_kv_computed_tokens"].observe(computed)
        if num_tokens > 1:
            histograms["request_time_per_output_token_seconds"].observe(decode_s / (num_tokens - 1))

    def series(self) -> Iterator[Series]:
        """Everything counted so far."""
        for name, values in self._histograms.items():
            yield series_of(name, values)
        for reason, count in self._reasons.items():
            yield counter("request_success", count, finished_reason=reason)


class TokenGaps:
    """Time between a request's tokens, as their steps' results were applied.

    A step hands over one array; they are counted together, now and then.
    """

    _FOLD: Final = 32768  # values: less than a millisecond's work

    def __init__(self) -> None:
        self._gaps: list[np.ndarray] = []
        self._num_gaps = 0
        self._histogram = Histogram(histogram.PER_TOKEN_S)

    def observe(self, gaps: np.ndarray) -> None:
        """Args: gaps: f64[m], seconds; NaN for a request's first token."""
        self._gaps.append(gaps)
        self._num_gaps += len(gaps)
        if self._num_gaps >= self._FOLD:
            self._fold()

    def _fold(self) -> None:
        if self._gaps:
            gaps = np.concatenate(self._gaps)
            self._gaps.clear()
            self._num_gaps = 0
            self._histogram.observe_many(gaps[~np.isnan(gaps)])

    def series(self) -> Series:
        self._fold()
        return series_of("inter_token_latency_seconds", self._histogram)


class PauseLog:
    """Pauses for garbage collection, of this process and of the worker."""

    def __init__(self) -> None:
        self._pauses = {name: Histogram(histogram.PAUSE_S) for name in ("core", "worker")}

    def observe(self, process: str, pauses_s: Iterable[float]) -> None:
        self._pauses[process].observe_many(list(pauses_s))

    def series(self) -> Iterator[Series]:
        for process, values in self._pauses.items():
            yield series_of("gc_pause_seconds", values, process=process)
