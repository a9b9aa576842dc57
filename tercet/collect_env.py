"""What a bug report needs to say about a machine: versions, hardware and settings, and no secrets."""

import importlib.metadata
import os
import platform
import re
import sys

import psutil

from tercet import envs
from tercet.errors import ConfigError
from tercet.version import __version__

Report = dict[str, dict[str, str]]
"""Section -> name -> value, in the order of printing."""


def collect_env() -> Report:
    """Look at this machine. Loads torch, so it takes seconds. Never fails: a value may be an error's text."""
    return {
        "Tercet": {"version": __version__, "installed at": os.path.dirname(os.path.abspath(__file__))},
        "System": _system(),
        "Devices": _devices(),
        "Packages": _packages(),
        "Settings": _settings(),
    }


def format_env(report: Report) -> str:
    """The report as text, one `name: value` per line under each section's title."""
    lines = []
    for title, values in report.items():
        width = max(map(len, values), default=0)
        lines += [title, *(f"  {name.ljust(width)}  {value}" for name, value in values.items()), ""]
    return "\n".join(lines)


def _system() -> dict[str, str]:
    memory = psutil.virtual_memory()
    return {
        "operating system": f"{platform.platform()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        "CPU": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} logical cores usable",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            match = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.machine()


def _devices() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's does not load
        return {"torch": f"cannot be imported: {error}"}
    devices = {"CUDA of torch": torch.version.cuda or "none (CPU build)"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute capability {capability}"
        )
    return devices


def _packages() -> dict[str, str]:
    """Installed versions of what Tercet depends on, by its own metadata where it is installed."""
    try:
        requirements = importlib.metadata.requires("tercet") or []
    except importlib.metadata.PackageNotFoundError:
        return {"tercet": "runs from a checkout that is not installed; versions are not known"}
    versions = {}
    for requirement in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if "extra ==" not in requirement:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed"
    return versions


def _settings() -> dict[str, str]:
    try:
        return {name: value or "(empty)" for name, (value, _) in envs.describe().items()}
    except ConfigError as error:
        return {error.field: error.problem}
