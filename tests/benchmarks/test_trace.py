"""The reader of traces, on traces made by hand: every figure is known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import timeline, trace

LAUNCHING, RESULTS = 100, 101  # threads
COMPUTE, COPIES = 7, 20  # streams
PERIOD, KERNEL, NUM_KERNELS, GAP_WITHIN = 1000.0, 200.0, 4, 10.0
BETWEEN = PERIOD - NUM_KERNELS * KERNEL - (NUM_KERNELS - 1) * GAP_WITHIN  # 170


def event(
    category: str, name: str, start: float, duration: float, thread: int, **args: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start,
        "dur": duration,
        "tid": thread,
        "args": args,
    }


def decode_step(number: int, *, kind: str = "decode", thread: int = LAUNCHING) -> list[dict[str, Any]]:
    """One copy in, one graph of four kernels a period later on the device, one copy out on another stream."""
    host, device, key = number * PERIOD, (number + 1) * PERIOD, number * 10
    events = [
        event("user_annotation", f"step {number} {kind}", host, 100, LAUNCHING),
        event("user_annotation", "apply", host + 1, 20, LAUNCHING),
        event("user_annotation", "inner of apply", host + 2, 5, LAUNCHING),
        event("cuda_runtime", "cudaMemcpyAsync", host + 30, 5, thread, correlation=key),
        event("cuda_runtime", "cudaGraphLaunch", host + 40, 30, thread, correlation=key + 1),
        event("cuda_driver", "cuGraphLaunch", host + 41, 20, thread, correlation=key + 1),  # the same call
        event("cuda_runtime", "cudaMemcpyAsync", host + 75, 5, thread, correlation=key + 2),
        event("cuda_runtime", "cudaEventSynchronize", host + 10, 60, RESULTS, correlation=key + 3),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", device - 3, 2, 0, stream=COPIES, correlation=key),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", device + 900, 2, 0, stream=COPIES, correlation=key + 2),
    ]  # fmt: skip
    for i in range(NUM_KERNELS):
        start = device + i * (KERNEL + GAP_WITHIN)
        events.append(event("kernel", f"k{i}", start, KERNEL, 0, stream=COMPUTE, correlation=key + 1))
    return events


def steady(count: int, **changes: Any) -> list[dict[str, Any]]:
    noise = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        event("cpu_op", "aten::add", 5, 1, LAUNCHING),
        event("user_annotation", "between steps", PERIOD - 50, 10, LAUNCHING),
    ]
    return [*noise, *(e for number in range(count) for e in decode_step(number, **changes))]


def test_steps_have_what_they_launched() -> None:
    found = trace.parse(steady(6))
    assert [step.number for step in found.steps] == list(range(6))
    assert found.stream == COMPUTE
    for step in found.steps:
        assert (step.kernels, step.launches, step.graph_launches) == (NUM_KERNELS, 1, 1)
        assert (step.copies("HtoD"), step.copies("DtoH"), step.syncs) == (1, 1, [])
        assert step.host_us == 100
        assert step.parts == {"apply": 20}


def test_gaps_tell_idle_between_steps_from_idle_between_kernels() -> None:
    gaps = trace.parse(steady(6)).gaps()
    assert [gap.number for gap in gaps] == list(range(5))
    for gap in gaps:
        assert (gap.period_us, gap.busy_us) == (PERIOD, NUM_KERNELS * KERNEL)
        assert gap.between_us == pytest.approx(BETWEEN)
        assert gap.within_us == pytest.approx((NUM_KERNELS - 1) * GAP_WITHIN)


def test_steps_that_run_into_each_other_have_no_gap() -> None:
    """As with programmatic dependent launch: the next step's first kernel starts before the last one ends."""
    late = event("kernel", "long", 1000, 1100, 0, stream=COMPUTE, correlation=1)
    gap = trace.parse([*steady(3), late]).gaps()[0]
    assert (gap.between_us, gap.busy_us, gap.within_us) == (0, PERIOD, 0)


def test_a_prefill_between_decodes_is_no_gap() -> None:
    events = [*steady(2), *decode_step(2, kind="prefill"), *decode_step(3), *decode_step(4)]
    assert [gap.number for gap in trace.parse(events).gaps()] == [0, 3]


def test_calls_that_wait_are_named() -> None:
    waits = [
        event("cuda_runtime", "cudaStreamSynchronize", 3085, 4, LAUNCHING, correlation=901),
        event("cuda_runtime", "cudaStreamWaitEvent", 3090, 1, LAUNCHING, correlation=902),  # the device waits
        event(
            "cuda_runtime", "cudaStreamSynchronize", 3500, 4, LAUNCHING, correlation=903
        ),  # outside any step
    ]
    found = trace.parse([*steady(6), *waits])
    assert [step.syncs for step in found.steps] == [[], [], [], ["cudaStreamSynchronize"], [], []]
    assert timeline.waiting_calls(found) == ["cudaStreamSynchronize"]


def test_threads_may_be_named_differently_by_calls() -> None:
    found = trace.parse(steady(4, thread=77))
    assert [step.graph_launches for step in found.steps] == [1] * 4


def test_a_trace_without_a_device_has_the_host_alone() -> None:
    events = [e for e in steady(8) if e.get("cat") in ("user_annotation", "cpu_op")]
    found = trace.parse(events)
    assert found.stream is None and found.gaps() == []
    figures = timeline.summarize(found)
    assert figures["host"] == 100 and "GPU busy" not in figures


def test_the_summary_leaves_out_the_edges_of_a_trace() -> None:
    events = steady(12)
    for early in events:
        if early["name"] == "cudaGraphLaunch" and early["ts"] < timeline.EDGE_STEPS * PERIOD:
            early["dur"] = 35.0
    slow = event("kernel", "slow", 1400, 5000, 0, stream=COPIES, correlation=2)
    figures = timeline.summarize(trace.parse([*events, slow]))
    assert figures["decode steps"] == 12 - 2 * timeline.EDGE_STEPS
    assert figures["idle between steps %"] == pytest.approx(100 * BETWEEN / PERIOD)
    assert figures["idle within step %"] == pytest.approx(100 * 3 * GAP_WITHIN / PERIOD)
    assert figures["in cudaGraphLaunch"] == 30
    assert figures["host outside CUDA"] == 100 - 40
    assert (figures["copies to GPU"], figures["waiting calls"], figures["launches"]) == (1, 0, 1)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_are_read_and_the_table_says_whether_the_goal_is_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], zipped: bool
) -> None:
    data = json.dumps({"traceEvents": steady(12)})
    path = tmp_path / ("t.json.gz" if zipped else "t.json")
    path.write_bytes(gzip.compress(data.encode()) if zipped else data.encode())
    (measurement,) = timeline.main(["--trace", str(path)])
    assert measurement.runs[0]["period"] == PERIOD
    assert "| idle between steps ≤ 2 % | **no** |" in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for content, problem in (({"a": 1}, "no Chrome trace"), ({"traceEvents": []}, "holds no step")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=problem):
            trace.read(path)


def test_overlapping_intervals_count_once() -> None:
    assert trace.covered([(0, 10), (5, 12), (20, 25), (21, 22)]) == 17
