"""What the core counts: steps over a ring that wraps, requests by how they ended, reports that it does not trust."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tercet.core_proc.metrics import CoreMetrics
from tercet.core_proc.telemetry import RING_STEPS, StepLog, TokenGaps
from tercet.core_proc.totals import MAX_SERIES, SeriesError, Totals
from tercet.gc_pauses import GcPauses
from tercet.histogram import Histogram, steps_of_1_2_5
from tercet.ipc.messages import StepResult
from tercet.ipc.telemetry import Metrics, Series
from tests.core_proc.harness import Engine, make_config, make_request

NOTHING = np.zeros(0, np.int32)


def make_result(step: int, host_us: float, step_us: float) -> StepResult:
    columns: dict[str, Any] = {"row": NOTHING, "gen": NOTHING, "token": NOTHING}
    finish = NOTHING.astype(np.uint8)
    return StepResult(epoch=1, step=step, finish=finish, host_us=host_us, step_us=step_us, **columns)


def make_series(name: str = "things", counts: list[int] | None = None, **fields: Any) -> Series:
    counts = [1, 2, 3] if counts is None else counts
    values = {"bounds": np.array([0.5, 1.0]), "counts": np.array(counts, np.int64), "total": 4.5}
    return Series(**{"name": name, **values, **fields})


def run_steps(log: StepLog, first: int, last: int) -> None:
    """As the overlapped loop does: a plan is made before the result of the one before it has come."""
    for step in range(first, last + 1):
        log.planned(step, 1e-6 * step, num_tokens=step % 7, num_decodes=1)
        if step > first:
            log.ended(make_result(step - 1, 10.0, 30.0), 5e-6)
    log.ended(make_result(last, 10.0, 30.0), 5e-6)


@pytest.mark.parametrize("count", [1, 5, RING_STEPS - 2, RING_STEPS + 3, 3 * RING_STEPS])
def test_every_step_is_counted_once_and_the_last_are_remembered(count: int) -> None:
    log = StepLog()
    run_steps(log, 1, count)
    found = {(series.name, series.labels.get("phase")): series for series in log.series()}
    for phase in ("schedule", "launch", "wait", "output"):
        assert found["step_phase_seconds", phase].counts.sum() == count
    assert found["step_phase_seconds", "wait"].total == pytest.approx(20e-6 * count)
    assert found["step_phase_seconds", "schedule"].total == pytest.approx(1e-6 * count * (count + 1) / 2)
    assert found["iteration_tokens_total", None].total == sum(step % 7 for step in range(1, count + 1))
    times = log.times(0)
    assert times.step.tolist() == list(range(max(1, count - RING_STEPS + 3), count + 1))
    assert times.schedule_us.tolist() == pytest.approx(times.step.tolist())
    assert set(times.wait_us.round(3).tolist()) == {20.0}
    assert log.times(count - 1).step.tolist() == [count]
    assert log.times(count).step.tolist() == []


def test_bounds_are_inclusive() -> None:
    values = Histogram((1.0, 2.0))
    values.observe(0.5)
    values.observe_many([1.0, 1.5, 2.0, 9.0])
    assert (values.counts.tolist(), values.total) == ([2, 2, 1], 14.0)
    assert steps_of_1_2_5(100) == (1, 2, 5, 10, 20, 50, 100)
    assert steps_of_1_2_5(99)[-1] == 50


def test_gaps_leave_out_first_tokens() -> None:
    gaps = TokenGaps()
    for _ in range(400):
        gaps.observe(np.array([0.02, np.nan] * 100))
    assert len(gaps._gaps) < 200, "they are counted now and then"
    assert gaps.series().counts.sum() == 40_000
    assert gaps.series().total == pytest.approx(800.0)


# ---- requests


def by_name(metrics: Metrics) -> dict[str, Series]:
    return {"/".join([series.name, *series.labels.values()]): series for series in metrics.series}


def test_requests_are_counted_when_they_end() -> None:
    engine = Engine(make_config())
    metrics = CoreMetrics(engine.scheduler, GcPauses())
    engine.add(make_request(10, handle=1, max_tokens=4, seeds=[1, 2]))
    engine.add(make_request(7, handle=5, max_tokens=3))
    engine.add(make_request(3, handle=9, max_tokens=30))
    engine.step()
    engine.step()
    engine.scheduler.abort(1, [9])
    while engine.step() is not None:
        pass
    found = by_name(metrics.metrics([], 0, None))
    reasons = {r: found[f"request_success/{r}"].counts[0] for r in ("stop", "length", "abort", "error")}
    assert reasons["abort"] == 1
    assert reasons["stop"] + reasons["length"] == 3
    assert found["request_prompt_tokens"].total == 10 + 10 + 7 + 3
    assert found["request_params_n"].total == 2 + 1 + 1
    assert found["request_params_n"].counts.sum() == 3
    generated = found["request_generation_tokens"].total
    assert generated == engine.scheduler.counters.generation_tokens
    assert found["inter_token_latency_seconds"].counts.sum() == generated - 4, "all but first tokens"
    assert found["request_queue_time_seconds"].counts.sum() == 4
    assert found["request_prefill_kv_computed_tokens"].counts.sum() == 4
    assert engine.scheduler.unfinished == {}


# ---- frontends


def test_totals_add_up_and_outlive_nothing_but_their_series() -> None:
    totals = Totals()
    totals.add(make_series())
    totals.add(make_series(counts=[4, 0, 1], total=0.5))
    totals.add(make_series(labels={"process": "frontend"}))
    first, second = totals.series()
    assert (first.counts.tolist(), first.total) == ([5, 2, 4], 5.0)
    assert second.counts.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "Bad name"},
        {"name": "x" * 65},
        {"labels": {"a": "b\n# HELP"}},
        {"labels": {"a-b": "c"}},
        {"labels": {f"l{i}": "x" for i in range(5)}},
        {"bounds": np.array([1.0, 0.5])},
        {"bounds": np.array([0.5, np.inf])},
        {"bounds": np.array([0.5, 1.0], np.float32)},
        {"bounds": np.arange(100.0), "counts": np.zeros(101, np.int64)},
        {"counts": np.array([1, 2], np.int64)},
        {"counts": np.array([1, -2, 3], np.int64)},
        {"counts": np.array([1, 2, 2**41], np.int64)},
        {"counts": np.array([1, 2, 3], np.int32)},
        {"total": np.nan},
    ],
)
def test_malformed_series_are_refused(fields: dict[str, Any]) -> None:
    totals = Totals()
    with pytest.raises(SeriesError):
        totals.add(msgspec.structs.replace(make_series(), **fields))
    assert totals.series() == []


def test_names_are_bounded_and_bounds_are_the_first_ones() -> None:
    totals = Totals()
    for index in range(MAX_SERIES):
        totals.add(make_series(f"n{index}"))
    with pytest.raises(SeriesError, match="more than"):
        totals.add(make_series("one_more"))
    with pytest.raises(SeriesError, match="other bounds"):
        totals.add(make_series("n0", bounds=np.array([0.5, 2.0])))
