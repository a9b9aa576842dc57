"""Figures of a run, defined and named as vLLM's `bench serve` does.

Latencies are of successful requests. TTFT: from sending to the first token. E2EL: to the last event. TPOT:
(E2EL - TTFT) / (output tokens - 1), of requests with at least two. ITL: each gap between chunks. Goodput:
requests per second that keep every objective (DistServe, Zhong et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from tercet.bench.stream import RequestResult
from tercet.errors import ConfigError

# Metric -> (name in the table, its heading). In the order of the table.
METRICS: Final[dict[str, tuple[str, str]]] = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
GOODPUT_METRICS: Final = ("ttft", "tpot", "e2el")
DETAILS: Final = ("input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors")
"""Result keys with an entry for each request, saved only with --save-detailed."""


class Sample(msgspec.Struct, frozen=True):
    """One request's lengths in tokens and its record."""

    prompt_len: int
    output_len: int
    result: RequestResult

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        if self.output_len < 2:
            return None
        return (self.result.latency_s - self.result.ttft_s) / (self.output_len - 1)


class Selection(msgspec.Struct, frozen=True):
    """What is reported: metrics, percentiles of them, and objectives in ms for goodput."""

    metrics: tuple[str, ...]
    percentiles: tuple[float, ...]
    goodput: dict[str, float] = {}

    def __post_init__(self) -> None:
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError("percentile_metrics", f"{name!r} is none of {', '.join(METRICS)}")
        for percentile in self.percentiles:
            if not 0 <= percentile <= 100:
                raise ConfigError("metric_percentiles", f"must be from 0 to 100; got {percentile}")
        for name, limit_ms in self.goodput.items():
            if name not in GOODPUT_METRICS:
                raise ConfigError("goodput", f"{name!r} is none of {', '.join(GOODPUT_METRICS)}")
            if not limit_ms >= 0:
                raise ConfigError("goodput", f"{name} must be at least 0 ms; got {limit_ms}")


def serving_result(
    samples: Sequence[Sample],
    start_s: float,
    selection: Selection,
    *,
    request_rate: float,
    max_concurrency: int | None,
) -> dict[str, Any]:
    """The figures of a run under vLLM's JSON keys, with one entry per request in lists.

    Args:
        samples: all requests, failed ones too.
        start_s: of the run (`time.perf_counter()`).
    """
    done = [sample for sample in samples if sample.result.success]
    duration_s = max((sample.result.end_s for sample in done), default=start_s) - start_s
    total_input = sum(sample.prompt_len for sample in done)
    total_output = sum(sample.output_len for sample in done)
    per_second = (lambda amount: amount / duration_s) if duration_s > 0 else (lambda amount: 0.0)
    num_good = sum(_is_good(sample, selection.goodput) for sample in done)
    result: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(samples) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": total_output,
        "request_throughput": per_second(len(done)),
        "request_goodput": per_second(num_good) if selection.goodput else None,
        "output_throughput": per_second(total_output),
        "total_token_throughput": per_second(total_input + total_output),
        **_lists(samples),
        "max_output_tokens_per_s": peak_tokens_per_s(done, start_s),
        "max_concurrent_requests": peak_concurrency(done),
    }
    for name, values in _latencies_ms(done, request_rate, max_concurrency).items():
        if name in selection.metrics:
            result.update(_statistics(name, values, selection.percentiles))
    return result


def _lists(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    results = [sample.result for sample in samples]
    return {
        "input_lens": [sample.prompt_len for sample in samples],
        "output_lens": [sample.output_len for sample in samples],
        "ttfts": [result.ttft_s for result in results],
        "itls": [result.itls_s for result in results],
        "latencies": [result.latency_s for result in results],
        "start_times": [result.start_s for result in results],
        "queue_times": [result.queue_s for result in results],
        "generated_texts": [result.text for result in results],
        "errors": [result.error for result in results],
    }


def _is_good(sample: Sample, objectives_ms: Mapping[str, float]) -> bool:
    measured_s = {
        "ttft": sample.result.ttft_s,
        "tpot": sample.tpot_s or 0.0,
        "e2el": sample.result.latency_s,
    }
    return all(measured_s[name] * 1e3 <= limit for name, limit in objectives_ms.items())


def _latencies_ms(
    done: Sequence[Sample], request_rate: float, max_concurrency: int | None
) -> dict[str, np.ndarray]:
    results = [sample.result for sample in done]
    latencies: dict[str, list[float]] = {
        "ttft": [result.ttft_s for result in results],
        "tpot": [tpot for sample in done if (tpot := sample.tpot_s) is not None],
        "itl": [itl for result in results for itl in result.itls_s],
        "e2el": [result.latency_s for result in results],
    }
    if max_concurrency is not None:
        latencies["client_queue_time"] = [result.queue_s for result in results]
        if math.isfinite(request_rate):
            including = [result.queue_s + result.latency_s for result in results]
            latencies["e2el_including_client_queue"] = including
    return {name: np.asarray(values or [0.0]) * 1e3 for name, values in latencies.items()}


def _statistics(name: str, values_ms: np.ndarray, percentiles: Sequence[float]) -> dict[str, float]:
    return {
        f"mean_{name}_ms": float(np.mean(values_ms)),
        f"median_{name}_ms": float(np.median(values_ms)),
        f"std_{name}_ms": float(np.std(values_ms)),
        **{
            f"p{percentile:g}_{name}_ms": float(np.percentile(values_ms, percentile))
            for percentile in percentiles
        },
    }


def peak_tokens_per_s(done: Sequence[Sample], start_s: float) -> float:
    """Most output tokens in any second, counted from the start; a chunk of several tokens counts all of them."""
    if not done:
        return 0.0
    times, weights = [], []
    for sample in done:
        arrivals = sample.result.token_times_s
        times.extend(arrivals)
        weights.extend([sample.output_len / len(arrivals)] * len(arrivals))
    seconds = np.maximum(np.asarray(times) - start_s, 0.0).astype(np.int64)
    return float(np.bincount(seconds, weights=np.asarray(weights)).max())


def peak_concurrency(done: Sequence[Sample]) -> int:
    """Most requests in flight at one moment."""
    events = [(sample.result.start_s, 1) for sample in done] + [(sample.result.end_s, -1) for sample in done]
    running = peak = 0
    for _, change in sorted(events):  # at equal times ends come first
        running += change
        peak = max(peak, running)
    return peak


def table(result: Mapping[str, Any], selection: Selection) -> str:
    """The figures as vLLM prints them."""
    lines = [f"{' Serving Benchmark Result ':=^50}"]
    lines += [f"{name:<40} {value:<10}" for name, value in _summary_rows(result, selection)]
    for name, (label, heading) in METRICS.items():
        if name not in selection.metrics or f"mean_{name}_ms" not in result:
            continue
        lines.append(f"{heading:-^50}")
        rows = [("Mean", "mean"), ("Median", "median")]
        rows += [(f"P{percentile:g}", f"p{percentile:g}") for percentile in selection.percentiles]
        lines += [f"{f'{word} {label} (ms):':<40} {result[f'{key}_{name}_ms']:<10.2f}" for word, key in rows]
    return "\n".join([*lines, "=" * 50])


def _summary_rows(result: Mapping[str, Any], selection: Selection) -> list[tuple[str, str]]:
    rows = [("Successful requests:", str(result["completed"])), ("Failed requests:", str(result["failed"]))]
    if result["max_concurrency"] is not None:
        rows.append(("Maximum request concurrency:", str(result["max_concurrency"])))
    if result["request_rate"] != "inf":
        rows.append(("Request rate configured (RPS):", f"{result['request_rate']:.2f}"))
    rows += [
        ("Benchmark duration (s):", f"{result['duration']:.2f}"),
        ("Total input tokens:", str(result["total_input_tokens"])),
        ("Total generated tokens:", str(result["total_output_tokens"])),
        ("Request throughput (req/s):", f"{result['request_throughput']:.2f}"),
    ]
    if selection.goodput:
        rows.append(("Request goodput (req/s):", f"{result['request_goodput']:.2f}"))
    return [
        *rows,
        ("Output token throughput (tok/s):", f"{result['output_throughput']:.2f}"),
        ("Peak output token throughput (tok/s):", f"{result['max_output_tokens_per_s']:.2f}"),
        ("Peak concurrent requests:", f"{result['max_concurrent_requests']:.2f}"),
        ("Total token throughput (tok/s):", f"{result['total_token_throughput']:.2f}"),
    ]
