"""An engine that is being attached to: what `AsyncLLM.connect` returns."""

from __future__ import annotations

from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tercet.frontend.async_llm import AsyncLLM


class Connecting:
    """What `AsyncLLM.connect` returns: to be awaited, or entered with `async with`."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._engine = engine

    def __await__(self) -> Generator[Any, None, AsyncLLM]:
        return self._started().__await__()

    async def __aenter__(self) -> AsyncLLM:
        return await self._started()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._engine.aclose()

    async def _started(self) -> AsyncLLM:
        try:
            await self._engine.start()
        except BaseException:
            self._engine.shutdown()
            raise
        return self._engine
