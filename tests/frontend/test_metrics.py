"""Every figure of the core has a metric, totals are read as vLLM's are, and the log line can be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tercet.frontend.metrics import (
    FAMILIES,
    PREFIX,
    Counter,
    Gauge,
    Histogram,
    Metric,
    StatsLogger,
    metrics_of,
    stats_line,
)
from tercet.ipc.messages import Stats
from tercet.ipc.telemetry import FrontendLoad, Metrics, Series
from tests.frontend.fake_core import make_limits

NOT_SHOWN = {"epoch", "time_s", "num_finished", "num_aborted", "num_refused"}
"""The last three are request_success and admission_rejections, which the core counts by reason."""


def make_stats(**fields: Any) -> Stats:
    values = dict.fromkeys(Stats.__struct_fields__, 0)
    return Stats(**{**values, **fields})


def make_metrics(*series: Series, **fields: Any) -> Metrics:
    return Metrics(**{"series": list(series), "frontends": [], "queues": {}, **fields})


def read(stats: Stats, metrics: Metrics) -> list[Metric]:
    return metrics_of(stats, metrics, make_limits(), "m")


def test_every_figure_of_the_core_is_shown() -> None:
    fields = [name for name in Stats.__struct_fields__ if name not in NOT_SHOWN]
    stats = make_stats(**{name: 1000 + index for index, name in enumerate(fields)})
    shown = {m.value for m in read(stats, make_metrics()) if isinstance(m, (Counter, Gauge))}
    assert {1000 + index for index in range(len(fields))} <= shown


def test_metrics_have_the_prefix_and_vllms_labels() -> None:
    frontend = FrontendLoad(slot=1, name="api", num_running=2, num_waiting=3)
    metrics = read(make_stats(num_waiting=3), make_metrics(frontends=[frontend], queues={"core_waiting": 3}))
    assert {m.name for m in metrics} <= {PREFIX + name for name in FAMILIES}
    assert all(m.labels["model_name"] == "m" and m.labels["engine"] == "0" for m in metrics)
    loads = {m.labels["state"]: m for m in metrics if m.name == "tercet:frontend_requests"}
    assert {state: m.value for state, m in loads.items() if isinstance(m, Gauge)} == {
        "running": 2,
        "waiting": 3,
        "preparing": 0,
    }


def test_buckets_are_cumulated() -> None:
    series = Series(
        name="time_to_first_token_seconds",
        bounds=np.array([0.5, 1.0]),
        counts=np.array([3, 0, 2], np.int64),
        total=7.5,
    )
    (found,) = [m for m in read(make_stats(), make_metrics(series)) if isinstance(m, Histogram)]
    assert (found.count, found.sum) == (5, 7.5)
    assert found.buckets == {"0.5": 3, "1.0": 3, "+Inf": 5}


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
    before = make_stats(time_s=100.0, prompt_tokens=50, generation_tokens=10, num_preemptions=1)
    now = make_stats(
        time_s=110.0,
        prompt_tokens=150,
        generation_tokens=510,
        num_running=3,
        num_waiting=4,
        kv_cache_usage=0.25,
        prefix_cache_queries=200,
        prefix_cache_hits=50,
        num_preemptions=3,
    )
    line = stats_line(now, before)
    assert line == (
        "prompt 10.0 tok/s, generation 50.0 tok/s, running 3, waiting 4, preemptions 2, KV cache 25.0%, "
        "prefix cache hits 25.0%"
    )
    assert "tok/s" not in stats_line(now, None)
