"""On what a figure was measured: commit, device, driver, versions, settings. Loads neither torch nor CUDA."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "numpy", "msgspec", "pyzmq", "uvloop", "tokenizers", "transformers")


def describe(commit: str | None) -> dict[str, Any]:
    """Commit, date, GPU, driver, CPU, versions and Tercet's environment variables, as JSON values.

    Args:
        commit: where git cannot tell it; None asks git.
    """
    gpu, driver, memory = _gpu()
    return {
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": gpu,
        "driver": driver,
        "gpu_memory": memory,
        "cpus": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "variables": {name: value for name, value in os.environ.items() if name.startswith("TERCET_")},
    }


def headline(environment: dict[str, Any]) -> str:
    """The same in one line."""
    commit, plus, changes = environment["commit"].partition("+")
    versions = ", ".join(f"{name} {environment['versions'].get(name)}" for name in ("torch", "triton"))
    return (
        f"{environment['gpu']}, driver {environment['driver']}, {environment['cpus']} CPUs, "
        f"{versions}, commit {commit[:12]}{plus}{changes}"
    )


def _gpu() -> tuple[str, str, str]:
    """Name, driver and memory by nvidia-smi: torch would open a context on the device that is measured."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    output = _output(command)
    if not output:
        return "none", "none", "0"
    name, driver, memory = (part.strip() for part in output.splitlines()[0].split(","))
    return name, driver, memory


def _commit() -> str:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return (commit + ("+changes" if changed else "")) if commit else "unknown"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
