"""Start and end of a worker process, whatever its runner."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

from tercet import log
from tercet.config import ProcessConfig
from tercet.errors import ConfigError, TercetError
from tercet.gc_pauses import GcPauses
from tercet.ipc.child import ChildProcess, Failed, Ready
from tercet.worker_proc.worker import Profiler, Runner, Worker, decode_config

logger = log.get_logger(__name__)


def run_worker(
    child: ChildProcess,
    make_runner: Callable[[ProcessConfig, ChildProcess], Runner],
    profiler: Profiler | None = None,
) -> int:
    """Load, say Hello, serve until Shutdown; returns the exit code."""
    config = decode_config(child.config)
    log.configure(f"worker {config.rank}")
    try:
        runner = make_runner(config, child)
    except (TercetError, OSError) as error:  # told by whoever started us, in one line
        child.report(Failed(str(error), error.field if isinstance(error, ConfigError) else ""))
        return 1
    except Exception as error:
        logger.exception("cannot start")
        child.report(Failed(f"{type(error).__name__}: {error}"))
        return 1
    pauses = GcPauses()
    worker = Worker(config, runner, os.getpid(), profiler, pauses)
    gc.collect()
    gc.freeze()  # weights and tables live to the end: later collections need not walk them
    pauses.install()
    child.report(Ready())
    try:
        worker.run()
    except Exception as error:
        logger.exception("the worker cannot go on")
        problem = f"{type(error).__name__}: {error}"
        child.report(Failed(problem))
        worker.fail(problem)
        return 1
    finally:
        worker.close()
    return 0
