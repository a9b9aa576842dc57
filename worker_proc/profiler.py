"""Traces of a worker's steps by torch's profiler, switched on and off between two steps.

`TERCET_TORCH_PROFILER_DIR` names the folder and so allows it. A trace is a Chrome trace (open it in Perfetto), gzipped:
what the device ran, every call into CUDA, and one annotation `step N decode` or `step N prefill` around each step on
the thread that launches. `benchmarks/gpu/timeline.py` reads it.

While no profile runs, nothing here is on a step's path.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tercet import envs
from tercet.ipc.messages import PROFILE_PREFIX, StepPlan
from tercet.log import get_logger
from tercet.worker_proc.worker import Deliver, Execute, ProfileError

logger = get_logger(__name__)

MAX_STEPS = 5000
"""After so many steps a trace ends by itself: its events are held in memory, and whoever asked may be gone."""


class TorchProfiler:
    """At most one trace at a time."""

    def __init__(self) -> None:
        self._profile: profile | None = None
        self._path = Path()
        self._num_steps = 0
        self._full = False  # the trace ended by itself, and its stop is still to come

    def start(self, prefix: str, execute: Execute) -> Execute:
        """Begin a trace.

        Args:
            prefix: of the file's name.
            execute: what runs a step.

        Returns:
            What runs and annotates a step.

        Raises:
            ProfileError: profiling is off, the prefix is no part of a file name, or a trace is being made.
        """
        folder = envs.TERCET_TORCH_PROFILER_DIR
        if folder is None:
            raise ProfileError("profiling is off: set TERCET_TORCH_PROFILER_DIR before the engine starts")
        if not re.fullmatch(PROFILE_PREFIX, prefix):
            raise ProfileError(f"prefix: must match {PROFILE_PREFIX}; got {prefix!r:.80}")
        if self._profile is not None:
            raise ProfileError("a profile is being made: stop it first")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ProfileError(f"TERCET_TORCH_PROFILER_DIR: {error}") from None
        self._path = folder / f"{prefix or 'profile'}_{time.time_ns()}.json.gz"
        self._num_steps, self._full = 0, False
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        started = profile(activities=activities, acc_events=True)
        try:
            started.start()
        except RuntimeError as error:  # another profiler holds the device
            raise ProfileError(f"torch's profiler does not start: {error}") from None
        self._profile = started
        return self._annotated(execute)

    def stop(self) -> None:
        """Wait for the device, end the trace and write it; takes a second or so.

        Raises:
            ProfileError: none is being made, or its file cannot be written.
        """
        if self._profile is None:
            if self._full:
                self._full = False
                return
            raise ProfileError("no profile is being made: start one first")
        try:
            self._write()
        except (OSError, RuntimeError) as error:
            raise ProfileError(f"{self._path}: {error}") from None

    def _write(self) -> None:
        assert self._profile is not None
        running, self._profile = self._profile, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        running.stop()
        running.export_chrome_trace(str(self._path))
        logger.info("profile of %d steps in %s", self._num_steps, self._path)

    def _annotated(self, execute: Execute) -> Execute:
        def run(plan: StepPlan, received_s: float, deliver: Deliver) -> None:
            if self._profile is not None:
                self._count()
            kind = "decode" if plan.chunks is None or not len(plan.chunks) else "prefill"
            with record_function(f"step {plan.step} {kind}"):
                execute(plan, received_s, deliver)

        return run

    def _count(self) -> None:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            self._full = True
            try:
                self._write()
            except (OSError, RuntimeError):
                logger.exception("the profile is lost: %s", self._path)
