"""Waiting until an engine has nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from tercet.frontend.validation import check_float
from tercet.ipc.messages import Stats

_FIRST_PAUSE_S: Final = 0.01
_LONGEST_PAUSE_S: Final = 1.0


async def wait_until_idle(
    get_stats: Callable[[], Awaitable[Stats]], num_own: Callable[[], int], timeout_s: float
) -> None:
    """Ask, at growing intervals, until nothing runs or waits at the core and nothing of one's own is unfinished.

    Args:
        get_stats: asks the core.
        num_own: unfinished requests of this frontend; their last tokens may still be on the way here.
        timeout_s: how long to go on asking; one question is asked in any case.

    Raises:
        TimeoutError: it was not idle by then; says what was left.
    """
    timeout_s = check_float("drain_timeout", timeout_s, 0)
    deadline = asyncio.get_running_loop().time() + timeout_s
    pause_s = _FIRST_PAUSE_S
    while True:
        stats = await get_stats()
        if not stats.num_running and not stats.num_waiting and not num_own():
            return
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            counts = f"{stats.num_running} requests are running, {stats.num_waiting} are waiting"
            raise TimeoutError(f"the engine is not idle after {timeout_s:g} s: {counts}")
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
