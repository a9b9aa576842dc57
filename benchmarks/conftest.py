"""What every benchmark's results say of the machine: enough to compare, nothing that names it."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

PACKAGES = ("msgspec", "numpy", "pyzmq", "tokenizers", "uvloop")


def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["usable_cpus"] = len(os.sched_getaffinity(0))
    machine_info["load_average"] = [round(load, 2) for load in os.getloadavg()]
    machine_info["packages"] = {name: importlib.metadata.version(name) for name in PACKAGES}
