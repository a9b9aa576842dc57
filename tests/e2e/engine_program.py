"""A program that runs an engine and a request of its own on it, for a test to kill.

`python -m tests.e2e.engine_program [ADDRESS]` prints `pids …` as soon as the engine's processes run, `ready ADDRESS`,
`busy` while tokens come, `dead …` when it is told that the engine died, and `left` at its end; `cannot start …` and
exit code 1 where it cannot.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import NoReturn

from tercet.config import EngineArgs, SimulationConfig
from tercet.errors import StartupError
from tercet.frontend.launcher import EngineProcesses
from tests.core_proc.harness import VOCAB_SIZE, make_request
from tests.core_proc.raw_frontend import RawFrontend


def make_processes(address: str | None = None) -> EngineProcesses:
    config = EngineArgs(
        device="simulated",
        max_model_len=100_000,
        num_gpu_blocks_override=10_000,
        hf_overrides={"vocab_size": VOCAB_SIZE},
        simulation=SimulationConfig(step_us=1000.0),
    ).create_engine_config()
    return EngineProcesses(config, address=address, log_level="ERROR")


def _print_pids(processes: EngineProcesses) -> None:
    while len(processes.pids) < 2:
        time.sleep(0.001)
    print("pids", *processes.pids.values(), flush=True)


def _be_busy(address: str, dead: threading.Event) -> None:
    with RawFrontend(address) as frontend:
        frontend.attach()
        frontend.add(make_request(4, max_tokens=90_000))
        frontend.read_until(lambda: len(frontend.tokens[1]) > 10)
        print("busy", flush=True)
        while not dead.is_set() and frontend.goodbye is None:
            count = len(frontend.tokens[1])
            frontend.read_until(lambda: len(frontend.tokens[1]) > count or dead.is_set())  # noqa: B023


def _fail(error: StartupError) -> NoReturn:
    print("cannot start", error, flush=True)
    raise SystemExit(1)


def main(address: str | None = None) -> None:
    try:
        processes = make_processes(address)
    except StartupError as error:
        _fail(error)
    dead = threading.Event()

    def on_death(problem: str) -> None:
        print("dead", problem, flush=True)
        dead.set()

    processes.on_death = on_death
    threading.Thread(target=_print_pids, args=(processes,), daemon=True).start()
    try:
        processes.start()
        print("ready", processes.address, flush=True)
        _be_busy(processes.address, dead)
    except KeyboardInterrupt:
        pass
    except StartupError as error:
        _fail(error)
    finally:
        processes.stop()
        print("left", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
