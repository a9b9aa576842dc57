"""Entry point of a worker process: `python -m tercet.worker_proc`, started by the launcher."""

from __future__ import annotations

import sys

from tercet.ipc.child import adopt

if __name__ == "__main__":
    child = adopt()
    from tercet.worker_proc.main import run_worker
    from tercet.worker_proc.profiler import TorchProfiler
    from tercet.worker_proc.start import make_runner

    sys.exit(run_worker(child, make_runner, TorchProfiler()))
