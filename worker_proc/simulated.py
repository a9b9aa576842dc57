"""Entry point of a simulated worker: `python -m tercet.worker_proc.simulated`, started by the launcher."""

from __future__ import annotations

import sys

from tercet.ipc.child import adopt

if __name__ == "__main__":
    child = adopt()
    from tercet.worker_proc.main import run_worker
    from tercet.worker_proc.simulated_runner import SimulatedRunner

    sys.exit(run_worker(child, lambda config, child: SimulatedRunner(config)))
