"""The engine's figures as a list of metrics, under vLLM's names with the prefix `tercet:`."""

from __future__ import annotations

from typing import Final

import msgspec

from tercet.ipc.messages import Stats
from tercet.log import get_logger

logger = get_logger(__name__)


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
    "num_preemptions": "num_preemptions",
    "recomputed_tokens": "recomputed_tokens",
    "request_success": "num_finished",
    "request_aborted": "num_aborted",
    "request_refused": "num_refused",
    "engine_steps": "step",
    "dropped_messages": "dropped_messages",
}


def metrics_of(stats: Stats, model_name: str) -> list[Metric]:
    """Every gauge and counter of the core."""
    labels = {"model_name": model_name}
    return [
        *(Gauge(f"tercet:{name}", labels, float(getattr(stats, field))) for name, field in _GAUGES.items()),
        *(Counter(f"tercet:{name}", labels, getattr(stats, field)) for name, field in _COUNTERS.items()),
    ]


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
    """The engine's state in one line for a log; throughputs are over the time since `before`."""
    rates = ""
    if before is not None and now.time_s > before.time_s:
        elapsed_s = now.time_s - before.time_s
        prompt = (now.prompt_tokens - before.prompt_tokens) / elapsed_s
        generation = (now.generation_tokens - before.generation_tokens) / elapsed_s
        rates = f"prompt {prompt:.1f} tok/s, generation {generation:.1f} tok/s, "
    hits = now.prefix_cache_hits / now.prefix_cache_queries if now.prefix_cache_queries else 0.0
    return (
        f"{rates}running {now.num_running}, waiting {now.num_waiting}, "
        f"KV cache {now.kv_cache_usage:.1%}, prefix cache hits {hits:.1%}"
    )
