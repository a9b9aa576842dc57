"""The engine's figures as a list of metrics, under vLLM's names with the prefix `tercet:`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Literal

import msgspec

from tercet.ipc.messages import Limits, Stats
from tercet.ipc.telemetry import Metrics, Series
from tercet.log import get_logger

logger = get_logger(__name__)

PREFIX: Final = "tercet:"


class Metric(msgspec.Struct, frozen=True):
    """A figure with a name. `labels` tell apart figures of the same name."""

    name: str
    labels: dict[str, str]


class Counter(Metric, frozen=True):
    """Grows from the engine's start on."""

    value: int


class Gauge(Metric, frozen=True):
    """A value now."""

    value: float


class Histogram(Metric, frozen=True):
    """Observed values since the engine's start.

    Attributes:
        count, sum: of all values.
        buckets: upper bound, as text, to how many values were not above it; the last bound is '+Inf'.
    """

    count: int
    sum: float
    buckets: dict[str, int]


class Family(msgspec.Struct, frozen=True):
    """What metrics of one name have in common."""

    kind: Literal["gauge", "counter", "histogram"]
    help: str


def _gauge(text: str) -> Family:
    return Family("gauge", text)


def _counter(text: str) -> Family:
    return Family("counter", text)


def _histogram(text: str) -> Family:
    return Family("histogram", text)


FAMILIES: Final = {
    # vLLM's names
    "num_requests_running": _gauge("Requests in a row of the batch."),
    "num_requests_waiting": _gauge("Requests in the core's queue."),
    "num_requests_waiting_by_reason": _gauge("Requests in the core's queue, by what they wait for."),
    "kv_cache_usage_perc": _gauge("Share of KV cache blocks that running requests hold; 1 is all."),
    "cache_config_info": _gauge("Sizes of the KV cache and of a step, as labels."),
    "prompt_tokens": _counter("Tokens of prompts whose computation has begun."),
    "prompt_tokens_by_source": _counter("The same, computed here or found in the prefix cache."),
    "prompt_tokens_cached": _counter("Tokens of prompts that were found in the prefix cache."),
    "generation_tokens": _counter("Generated tokens."),
    "prefix_cache_queries": _counter("Tokens looked up in the prefix cache."),
    "prefix_cache_hits": _counter("Tokens found in the prefix cache."),
    "num_preemptions": _counter("Requests that lost their row and were computed again later."),
    "request_success": _counter("Completions that have ended, by reason."),
    "admission_rejections": _counter("Requests that were not taken, by reason."),
    "corrupted_requests": _counter("Requests that failed in the worker, as with logits that are not finite."),
    "time_to_first_token_seconds": _histogram("From a request's arrival to its first token in the frontend."),
    "inter_token_latency_seconds": _histogram("Between two tokens of a completion, in the core."),
    "request_time_per_output_token_seconds": _histogram("Decode time by tokens after the first."),
    "e2e_request_latency_seconds": _histogram("From a request's arrival to a completion's end."),
    "request_queue_time_seconds": _histogram("From arrival in the core to the first step."),
    "request_prefill_time_seconds": _histogram("From the first step to the first token."),
    "request_decode_time_seconds": _histogram("From the first token to the last."),
    "request_inference_time_seconds": _histogram("From the first step to the last token."),
    "request_prompt_tokens": _histogram("Tokens of a prompt."),
    "request_generation_tokens": _histogram("Tokens of a completion."),
    "request_max_num_generation_tokens": _histogram("Tokens of a request's longest completion."),
    "request_params_n": _histogram("Completions asked for by a request."),
    "request_params_max_tokens": _histogram("max_tokens of a request."),
    "request_num_preemptions": _histogram("How often a completion was preempted."),
    "request_prefill_kv_computed_tokens": _histogram("Tokens of a prompt that were not cached."),
    "iteration_tokens_total": _histogram("Tokens computed in a step."),
    # Tercet's own
    "num_free_blocks": _gauge("KV cache blocks that no request holds."),
    "num_frontends": _gauge("Frontends attached to the core."),
    "frontend_requests": _gauge("Requests in progress, by frontend and state."),
    "queue_depth": _gauge("What waits at each hop of a request's way, by hop."),
    "recomputed_tokens": _counter("Tokens computed again after a preemption."),
    "engine_steps": _counter("Steps planned."),
    "dropped_messages": _counter("Messages that the core could not use."),
    "step_phase_seconds": _histogram("Parts of a step: schedule, output (core), launch, wait (worker)."),
    "gc_pause_seconds": _histogram("Collections of garbage, by process."),
}
"""Every family that an engine exports, by name without prefix. Names of counters get `_total` as text."""

_GAUGES: Final = {
    "num_requests_running": "num_running",
    "num_requests_waiting": "num_waiting",
    "kv_cache_usage_perc": "kv_cache_usage",  # a share of 1, as in vLLM in spite of its name
    "num_free_blocks": "num_free_blocks",
    "num_frontends": "num_frontends",
}
_COUNTERS: Final = {
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "prompt_tokens_cached": "prefix_cache_hits",
    "num_preemptions": "num_preemptions",
    "recomputed_tokens": "recomputed_tokens",
    "engine_steps": "step",
    "dropped_messages": "dropped_messages",
}


def metrics_of(stats: Stats, metrics: Metrics, limits: Limits, model_name: str) -> list[Metric]:
    """Everything that the core has told, in the order of `FAMILIES`.

    Args:
        metrics: totals of the core and of all frontends.
        model_name: for the label that all have; `engine` is the other one.
    """
    base = {"model_name": model_name, "engine": "0"}
    found = [*_of_stats(stats), *_of_metrics(stats, metrics), _cache_config(limits)]
    found += [_of_series(series) for series in metrics.series]
    order = {name: index for index, name in enumerate(FAMILIES)}
    found.sort(key=lambda metric: order.get(metric.name, len(order)))
    named = (
        msgspec.structs.replace(metric, name=PREFIX + metric.name, labels={**base, **metric.labels})
        for metric in found
    )
    return list(named)


def _of_stats(stats: Stats) -> Iterator[Metric]:
    for name, field in _GAUGES.items():
        yield Gauge(name, {}, float(getattr(stats, field)))
    for name, field in _COUNTERS.items():
        yield Counter(name, {}, getattr(stats, field))
    hits = stats.prefix_cache_hits
    yield Counter("prompt_tokens_by_source", {"source": "local_compute"}, stats.prompt_tokens - hits)
    yield Counter("prompt_tokens_by_source", {"source": "local_cache_hit"}, hits)


def _of_metrics(stats: Stats, metrics: Metrics) -> Iterator[Metric]:
    for hop, depth in metrics.queues.items():
        yield Gauge("queue_depth", {"hop": hop}, float(depth))
    deferred = metrics.queues.get("core_deferred", 0)
    yield Gauge("num_requests_waiting_by_reason", {"reason": "capacity"}, float(stats.num_waiting - deferred))
    yield Gauge("num_requests_waiting_by_reason", {"reason": "deferred"}, float(deferred))
    for frontend in metrics.frontends:
        labels = {"frontend": f"{frontend.slot}", "name": frontend.name}
        states = {"running": frontend.num_running, "waiting": frontend.num_waiting}
        for state, number in {**states, "preparing": frontend.num_preparing}.items():
            yield Gauge("frontend_requests", {**labels, "state": state}, float(number))


def _cache_config(limits: Limits) -> Gauge:
    labels = {
        "block_size": str(limits.block_size),
        "num_gpu_blocks": str(limits.num_blocks),
        "max_num_seqs": str(limits.max_num_seqs),
        "max_num_batched_tokens": str(limits.max_num_batched_tokens),
    }
    return Gauge("cache_config_info", labels, 1.0)


def _of_series(series: Series) -> Metric:
    counts = series.counts.tolist()
    if not len(series.bounds):
        return Counter(series.name, series.labels, counts[0])
    buckets, below = {}, 0
    for bound, count in zip([*map(bound_text, series.bounds.tolist()), "+Inf"], counts, strict=True):
        below += count
        buckets[bound] = below
    return Histogram(series.name, series.labels, below, series.total, buckets)


def bound_text(bound: float) -> str:
    """As prometheus_client writes it: `5.0`, `0.001`, `1e-05`."""
    return repr(float(bound))


def family_of(metric: Metric) -> tuple[str, Family]:
    """Its name as text, and what is known of it, which for what a newer frontend counts may be little."""
    name = metric.name.removeprefix(PREFIX)
    known = FAMILIES.get(name)
    if known is None:
        known = Family("counter" if isinstance(metric, Counter) else "histogram", "Reported by a frontend.")
    return metric.name + ("_total" if known.kind == "counter" else ""), known


def by_name(metrics: Iterable[Metric]) -> dict[str, list[Metric]]:
    """Metrics of one family side by side, in their order."""
    found: dict[str, list[Metric]] = {}
    for metric in metrics:
        found.setdefault(metric.name, []).append(metric)
    return found


class StatsLogger:
    """Logs the engine's state now and then, and nothing while it is idle."""

    def __init__(self, interval_s: float = 10.0) -> None:
        self._interval_s = interval_s
        self._last: Stats | None = None

    def observe(self, stats: Stats) -> None:
        """Take the figures; log them if the last line is older than the interval and there is work."""
        last = self._last
        if last is not None and stats.time_s - last.time_s < self._interval_s:
            return
        self._last = stats
        worked = last is not None and (stats.step, stats.num_waiting) != (last.step, 0)
        if worked or stats.num_running or stats.num_waiting:
            logger.info("%s", stats_line(stats, last))


def stats_line(now: Stats, before: Stats | None) -> str:
    """The engine's state in one line for a log; throughputs and preemptions are over the time since `before`."""
    rates = preemptions = ""
    if before is not None and now.time_s > before.time_s:
        elapsed_s = now.time_s - before.time_s
        prompt = (now.prompt_tokens - before.prompt_tokens) / elapsed_s
        generation = (now.generation_tokens - before.generation_tokens) / elapsed_s
        rates = f"prompt {prompt:.1f} tok/s, generation {generation:.1f} tok/s, "
        if count := now.num_preemptions - before.num_preemptions:
            preemptions = f"preemptions {count}, "
    hits = now.prefix_cache_hits / now.prefix_cache_queries if now.prefix_cache_queries else 0.0
    return (
        f"{rates}running {now.num_running}, waiting {now.num_waiting}, {preemptions}"
        f"KV cache {now.kv_cache_usage:.1%}, prefix cache hits {hits:.1%}"
    )
