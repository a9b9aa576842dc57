"""How an engine object ends that nobody shut down: its engine died, or it was dropped."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tercet.frontend.client import CoreClient
from tercet.frontend.launcher import EngineProcesses


def is_running_loop(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller runs on this event loop."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def death_notice(client: weakref.ref[CoreClient]) -> Callable[[str], None]:
    """For the supervisor's thread. Holds the client weakly, so that a forgotten engine can be collected."""

    def on_death(problem: str) -> None:
        if (alive := client()) is not None:
            loop = alive.loop
            if loop is None or not loop.is_running():
                alive.die(problem)
                return
            try:
                loop.call_soon_threadsafe(alive.die, problem)
            except RuntimeError:  # closed meanwhile
                pass

    return on_death


def release(client: CoreClient, processes: EngineProcesses | None, pool: ThreadPoolExecutor) -> None:
    """What is left to do for an engine that was dropped, or is alive at exit, without `shutdown`."""
    if client.is_forked:
        return  # a child's exit, or its dropped copy: all of this is the parent's
    loop = client.loop
    if loop is not None and loop.is_running() and not is_running_loop(loop):
        loop.call_soon_threadsafe(client.close)
    else:
        client.close()
    if processes is not None:
        processes.stop()
    pool.shutdown(wait=False, cancel_futures=True)
