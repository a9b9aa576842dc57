"""A parent that starts children under a supervisor and says what happens, for a test to kill it.

`python -m tests.ipc.helpers.parent_program WORDS…`: one child for each argument, which is its configuration.
Prints `pids …` as soon as they run, `ready` once they are, `dead …` when one died, `left` in the end.
"""

from __future__ import annotations

import sys
import threading
import time

from tercet.ipc.process import ProcessSpec
from tercet.ipc.supervisor import Supervisor


def _print_pids(supervisor: Supervisor, count: int) -> None:
    while len(supervisor.pids) < count:
        time.sleep(0.001)
    print("pids", *supervisor.pids.values(), flush=True)


def main(configs: list[str]) -> None:
    specs = [
        ProcessSpec(f"child {i}", "tests.ipc.helpers.child_program", config.encode())
        for i, config in enumerate(configs)
    ]
    dead = threading.Event()

    def on_death(problem: str) -> None:
        print("dead", problem, flush=True)
        dead.set()

    supervisor = Supervisor(specs, on_death=on_death)
    threading.Thread(target=_print_pids, args=(supervisor, len(specs)), daemon=True).start()
    try:
        supervisor.start()
        print("ready", flush=True)
        dead.wait()
    except KeyboardInterrupt:
        pass
    finally:
        supervisor.stop()
        print("left", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
