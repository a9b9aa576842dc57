"""Which host this is: whoever shares it can be watched through its process id."""

from __future__ import annotations

import socket
from pathlib import Path


def host_id() -> str:
    """Equal for two processes only if they share a kernel: the host's name and the id of its boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"
