"""Every figure of the core's Stats has a metric, and the log line can be read."""

from __future__ import annotations

from typing import Any

import pytest

from tercet.frontend.metrics import Counter, Gauge, StatsLogger, metrics_of, stats_line
from tercet.ipc.messages import Stats


def make_stats(**fields: Any) -> Stats:
    values = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**values, **fields})


def test_every_field_is_shown_once() -> None:
    fields = [name for name in Stats.__struct_fields__ if name not in ("epoch", "time_s")]
    stats = make_stats(**{name: index + 1 for index, name in enumerate(fields)})
    metrics = metrics_of(stats, "m")
    assert sorted(m.value for m in metrics if isinstance(m, (Counter, Gauge))) == list(
        range(1, len(fields) + 1)
    )
    assert all(m.name.startswith("tercet:") and m.labels == {"model_name": "m"} for m in metrics)


def test_logger_speaks_every_interval_and_only_of_work(caplog: pytest.LogCaptureFixture) -> None:
    observed = StatsLogger(interval_s=10.0)
    with caplog.at_level("INFO", logger="tercet"):
        observed.observe(make_stats(time_s=0.0))
        observed.observe(make_stats(time_s=20.0))  # idle
        assert caplog.records == []
        observed.observe(make_stats(time_s=40.0, num_running=1, step=5))
        observed.observe(make_stats(time_s=45.0, num_running=1, step=9))  # too soon
        observed.observe(make_stats(time_s=60.0, step=20))  # has worked since
        observed.observe(make_stats(time_s=80.0, step=20))
    assert len(caplog.records) == 2


def test_log_line() -> None:
    before = make_stats(time_s=100.0, prompt_tokens=50, generation_tokens=10)
    now = make_stats(
        time_s=110.0,
        prompt_tokens=150,
        generation_tokens=510,
        num_running=3,
        num_waiting=4,
        kv_cache_usage=0.25,
        prefix_cache_queries=200,
        prefix_cache_hits=50,
    )
    line = stats_line(now, before)
    assert line == (
        "prompt 10.0 tok/s, generation 50.0 tok/s, running 3, waiting 4, KV cache 25.0%, "
        "prefix cache hits 25.0%"
    )
    assert "tok/s" not in stats_line(now, None)
