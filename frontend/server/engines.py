"""Where an API server's engine comes from: it starts one of its own, or attaches to one that runs or will."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import msgspec

from tercet.config import EngineConfig
from tercet.errors import ConfigError, EngineError, StartupError
from tercet.frontend.async_llm import AsyncLLM
from tercet.frontend.launcher import EngineProcesses
from tercet.frontend.server.context import Progress
from tercet.ipc.address import is_serving

_POLL_S: Final = 0.1
_SHARE: Final = re.compile(r"(.*) (\d+)/(\d+)")


def parse_progress(words: str) -> Progress:
    """`worker 0: loading weights 3/4` as phase, done and total."""
    if match := _SHARE.fullmatch(words):
        return Progress(match[1], int(match[2]), int(match[3]))
    return Progress(words)


class EngineSource(Protocol):
    """What gives a server its engine. `cancel` makes a pending `open` end early; safe at any time."""

    def progress(self) -> Progress: ...

    async def open(self) -> AsyncLLM: ...

    async def cancel(self) -> None: ...


class OwnEngine:
    """An engine that this process starts, and that ends with it.

    Args:
        tell: shown what the start is doing, from another thread.
        log_stats: log the engine's state every 10 s of work.
    """

    def __init__(
        self, config: EngineConfig, *, tell: Callable[[str], None] | None = None, log_stats: bool = True
    ) -> None:
        self._progress = Progress("starting the engine")
        self._tell = tell
        self._log_stats = log_stats
        self._processes = EngineProcesses(config, progress=self._on_progress)
        self._cancelled = False

    def progress(self) -> Progress:
        return self._progress

    def _on_progress(self, words: str) -> None:
        self._progress = parse_progress(words)
        if self._tell is not None:
            self._tell(words)

    async def open(self) -> AsyncLLM:
        """
        Raises:
            StartupError: it cannot start, or was cancelled; nothing is left running.
        """
        processes = self._processes
        try:
            await asyncio.to_thread(processes.start)
            if self._cancelled:
                raise StartupError("stopped while starting")
        except BaseException:
            await asyncio.to_thread(processes.stop)
            raise
        return AsyncLLM(processes.address, processes=processes, log_stats=self._log_stats)

    async def cancel(self) -> None:
        self._cancelled = True
        await asyncio.to_thread(self._processes.stop)


class AttachedEngine:
    """An engine that runs elsewhere.

    Args:
        address: where it listens.
        wait: it may be starting still, so its socket is waited for.
        progress_path: a file in which whoever starts it says how far it is.
        log_stats: log the engine's state every 10 s of work.
    """

    def __init__(
        self, address: str, *, wait: bool = False, progress_path: str | None = None, log_stats: bool = True
    ) -> None:
        self._address = address
        self._log_stats = log_stats
        self._wait = wait
        self._progress_path = progress_path
        self._cancelled = False

    def progress(self) -> Progress:
        if self._progress_path is not None:
            try:
                return msgspec.json.decode(Path(self._progress_path).read_bytes(), type=Progress)
            except (OSError, msgspec.MsgspecError):
                pass
        return Progress("waiting for the engine")

    async def open(self) -> AsyncLLM:
        """
        Raises:
            ConfigError: no engine listens there.
            EngineError: it does not answer, or the wait was cancelled.
        """
        while self._wait and not is_serving(self._address):
            if self._cancelled:
                raise EngineError("stopped while waiting for the engine")
            await asyncio.sleep(_POLL_S)
        try:
            return await AsyncLLM.connect(self._address, log_stats=self._log_stats)
        except ConfigError as error:
            raise ConfigError("connect", error.problem) from None

    async def cancel(self) -> None:
        self._cancelled = True


def write_progress(path: Path, words: str) -> None:
    """Say, for other processes, how far an engine's start is."""
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(parse_progress(words)))
    part.replace(path)
