"""The benchmarks of a GPU at tiny size, through the real engine on a CPU."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import ablation, options, peers, plot, results, run, timeline, workloads
from benchmarks.gpu.engines import OFFLINE_LIMITS, Plan
from benchmarks.gpu.results import Measurement, Results
from benchmarks.gpu.shapes import SHAPES
from tercet import LLM, EngineArgs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def arguments(out: Path, *more: str, device: str = "cpu") -> list[str]:
    return ["--scale", "tiny", "--device", device, "--out", str(out), "--commit", "c0ffee", *more]


def by_case(found: list[Measurement]) -> dict[tuple[str, str], Measurement]:
    return {(m.workload, m.case): m for m in found}


def test_run_measures_every_workload_and_keeps_every_run(tmp_path: Path) -> None:
    done = run.main(arguments(tmp_path, "--shapes", "S"))
    found = by_case(results.load(done.path))
    assert not done.not_run and not [m.error for m in found.values() if m.error]
    sizes = workloads.TINY
    assert len(found["W1", ""].runs) == sizes.w1_runs and len(found["W2", ""].runs) == sizes.w2_runs
    assert {case for name, case in found if name == "W3"} == {str(batch) for batch in sizes.w3_batches}
    assert {case for name, case in found if name == "W5"} == {str(level[0]) for level in sizes.w5_levels}
    assert {case for name, case in found if name == "start"} == {"LLM", "AsyncLLM"}
    for measurement in found.values():
        assert measurement.runs and all(
            value > 0 for figures in measurement.runs for value in figures.values()
        )
        assert len(measurement.warmup) == (measurement.workload != "start")
    data = json.loads(done.path.read_text())
    assert data["environment"]["commit"] == "c0ffee" and data["environment"]["versions"]["torch"]
    assert [engine["kind"] for engine in data["engines"]] == ["LLM", "AsyncLLM"]


def test_a_run_without_time_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run.main(arguments(tmp_path, "--shapes", "A,B", "--time-limit", "0", device="simulated"))
    assert done.not_run == [
        f"{what}: the time limit" for what in ("A W1/W2/W3/W4", "A W5", "B W1/W2/W3/W4", "B W5")
    ]
    assert "not run: B W5: the time limit" in capsys.readouterr().out
    assert json.loads(done.path.read_text())["not_run"] == done.not_run


@pytest.mark.parametrize(("names", "case"), [("W1", "W1"), ("W5", "W5 4")])
def test_a_run_is_cut_off_at_its_limit(tmp_path: Path, names: str, case: str) -> None:
    # The shortest workload has four steps and the engine starts well within the limit, so that the limit comes
    # in the middle of the warm-up however busy the machine is.
    limit_s, step_s = 6, 2
    slow = json.dumps({"simulation": {"step_us": step_s * 1_000_000}})
    limited = ["--time-limit", str(limit_s), "--workloads", names, "--shapes", "A", "--engine-args", slow]
    started = time.monotonic()
    done = run.main(arguments(tmp_path, *limited, device="simulated"))
    assert time.monotonic() - started < limit_s + 5  # and the engine's end
    assert done.not_run == [f"A {case}: the time limit, in the middle"]


def test_an_engine_that_cannot_start_is_an_error_of_its_rows_alone(tmp_path: Path) -> None:
    done = run.main(
        arguments(tmp_path, "--shapes", "A", "--engine-args", '{"block_size": 0}', device="simulated")
    )
    assert [m.error.partition(":")[0] for m in done.measurements] == ["block_size"] * 2
    assert "error: block_size" in results.table(done)


def test_a_workload_that_fails_leaves_the_others_be(tmp_path: Path) -> None:
    short = ["--engine-args", '{"max_model_len": 32}', "--shapes", "A", "--workloads", "W4,W2"]
    done = run.main(arguments(tmp_path, *short, device="simulated"))
    found = by_case(done.measurements)
    assert "prompt" in found["W4", ""].error and not found["W4", ""].runs
    assert len(found["W2", ""].runs) == workloads.TINY.w2_runs and len(done.engines) == 1


def test_after_an_engine_has_died_the_rest_runs_on_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = workloads.offline_cases

    def cases(workload: str, llm: LLM, sizes: workloads.Sizes) -> list[workloads.Case]:
        if workload == "W2":
            os.kill(llm._engine._processes.pids["worker 0"], signal.SIGKILL)  # type: ignore[union-attr]
        return made(workload, llm, sizes)

    monkeypatch.setattr(workloads, "offline_cases", cases)
    limited = ["--shapes", "A", "--workloads", "W1,W2,W4"]
    done = run.main(arguments(tmp_path, *limited, device="simulated"))
    found = by_case(done.measurements)
    assert "was killed by SIGKILL" in found["W2", ""].error
    assert found["W1", ""].runs and found["W4", ""].runs and len(done.engines) == 2


def test_timeline_traces_the_worker(tmp_path: Path) -> None:
    (found,) = timeline.main(arguments(tmp_path, "--batches", "2", "--steps", "9"))
    assert found.case == "2" and found.runs[0]["decode steps"] >= 3
    assert found.runs[0]["host"] > 0 and found.runs[0]["untraced ms"] > 0
    assert len(list(tmp_path.glob("timeline-A-2_*.json.gz"))) == 1
    assert not list(tmp_path.glob("warmup*"))


def test_ablation_compares_with_everything_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = ablation.main(arguments(tmp_path, "--variants", "reference kernels"))
    assert not [m.error for m in done.measurements if m.error]
    engines = {engine["variant"]: engine for engine in done.engines}
    assert list(engines) == [ablation.BASELINE, "reference kernels"]
    assert engines["reference kernels"]["env"] == {"TERCET_OPS": "reference"}
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| reference kernels | ") and "(×" in line for line in lines) == 1


def test_every_kernel_with_an_alternative_takes_part() -> None:
    made = ablation.kernel_variants({"a": ("triton", "reference"), "b": ("reference",)})
    assert [variant.env for variant in made] == [{"TERCET_OPS": "a=reference"}]


def test_lines_of_a_plot_come_from_sweep_and_workloads() -> None:
    def made(workload: str, batch: int, figures: dict[str, float], variant: str = "") -> Measurement:
        return Measurement("A", workload, str(batch), "", variant, batch, runs=[figures])

    throughput, latency = plot.lines([
        made("sweep", 1, {peers.OUTPUT: 500.0, peers.STEP: 2.0}),
        made("W3", 64, {peers.OUTPUT: 9000.0, peers.STEP: 3.0}),
        made("W3", 64, {peers.OUTPUT: 1.0, peers.STEP: 9.0}, "no overlap"),
        made("W5", 16, {peers.OUTPUT: 5000.0, peers.ITL50: 2.5}),
        made("W4", 16, {peers.INPUT: 5000.0}),
    ])  # fmt: skip
    assert throughput == {"A LLM": {1: 500.0, 64: 9000.0}, "A AsyncLLM": {16: 5000.0}}
    assert latency == {"A LLM": {1: 2.0, 64: 3.0}, "A AsyncLLM": {16: 2.5}}


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.svg"
    plot.draw({"A LLM": {1: 500.0, 64: 9000.0}}, {"A LLM": {1: 2.0}}, path)
    assert path.read_text().lstrip().startswith("<?xml")


def test_w1_is_the_workload_that_its_peers_ran() -> None:
    class Engine:
        """What `offline_cases` asks of an engine before it runs."""

        model_info = type("Info", (), {"vocab_size": SHAPES["A"].vocab})

    (case,) = workloads.offline_cases("W1", Engine(), workloads.FULL)  # type: ignore[arg-type]
    assert case.what == "256 requests, 142,827 tokens in, 133,966 out, T 0.6"


@pytest.mark.parametrize("name", SHAPES)
def test_full_shapes_are_models_that_an_engine_takes(tmp_path: Path, name: str) -> None:
    plan = Plan(tmp_path, device="cpu", extra={"kv_cache_memory_bytes": 1 << 30})
    config = EngineArgs(**plan.arguments(SHAPES[name], OFFLINE_LIMITS)).create_engine_config()
    assert config.model.vocab_size == SHAPES[name].vocab and config.model.max_model_len == 8192
    assert config.model.dtype == "bfloat16"
    assert (config.scheduler.max_num_batched_tokens, config.scheduler.max_num_seqs) == (16384, 1024)


def test_goals_are_judged_by_the_metric(tmp_path: Path) -> None:
    environment: dict[str, Any] = {
        "gpu": "NVIDIA H100",
        "driver": "1",
        "cpus": 1,
        "versions": {},
        "commit": "c",
    }
    made = Results(tmp_path / "r.json", environment, {})
    made.add(Measurement("A", "W2", "", "", runs=[{peers.TOKEN: 1.0, peers.TTFT: 9.0}]))
    text = results.table(made)
    assert "| A | W2 | ms per token | 1.000 | 1.92 | ≤ 1.1 | yes |" in text
    assert "| A | W2 | TTFT ms | 9.000 | 8.8 | ≤ 4 | **no** |" in text


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parser(None, "A").parse_args(["--shapes", "Z"])
    assert "'Z': there are A, B, S" in capsys.readouterr().err
