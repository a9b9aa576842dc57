"""Traces by torch's profiler: bounds and failures. `tests/e2e/test_profile.py` has whole engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import trace
from tercet.ipc.messages import StepPlan
from tercet.worker_proc import profiler
from tercet.worker_proc.profiler import TorchProfiler
from tercet.worker_proc.worker import Deliver, ProfileError


def test_without_a_folder_profiling_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TERCET_TORCH_PROFILER_DIR", raising=False)
    with pytest.raises(ProfileError, match="set TERCET_TORCH_PROFILER_DIR before the engine starts"):
        TorchProfiler().start("", lambda *_: None)


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TERCET_TORCH_PROFILER_DIR", str(tmp_path / "file" / "folder"))
    with pytest.raises(ProfileError, match=r"TERCET_TORCH_PROFILER_DIR: .*file/folder"):
        TorchProfiler().start("", lambda *_: None)


def test_a_trace_that_nobody_stops_ends_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TERCET_TORCH_PROFILER_DIR", str(tmp_path))
    monkeypatch.setattr(profiler, "MAX_STEPS", 3)
    seen: list[int] = []

    def execute(plan: StepPlan, received_s: float, deliver: Deliver) -> None:
        seen.append(plan.step)

    made = TorchProfiler()
    traced = made.start("", execute)
    for number in range(1, 6):
        traced(StepPlan(epoch=1, step=number), 0.0, lambda _: None)
    assert seen == [1, 2, 3, 4, 5]
    (path,) = tmp_path.glob("profile_*.json.gz")
    assert [step.number for step in trace.read(path).steps] == [1, 2, 3]
    made.stop()  # whoever comes late is not told off
    with pytest.raises(ProfileError, match="no profile is being made"):
        made.stop()
