"""The life of one API server's process: listen, get the engine, serve, leave. Returns an exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from typing import Final

from tercet.errors import TercetError
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.engines import EngineSource
from tercet.frontend.server.serving import ApiServer, on_signals

_WATCH_S: Final = 0.2


class ServerFailedError(TercetError):
    """The server ended because its engine could not start, or has died."""


async def run_server(
    server: ApiServer,
    context: ServerContext,
    source: EngineSource,
    *,
    on_listening: Callable[[], None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal, then 0.

    Args:
        on_listening: called once probes are answered.
        on_ready: called once requests are.

    Raises:
        TercetError: the engine cannot start or be attached to.
        ServerFailedError: it has died.
    """
    on_signals(server.stop)
    context.start_progress = source.progress
    serving = asyncio.create_task(server.run(), name="tercet-serve")
    living = asyncio.create_task(_live(context, source, on_ready), name="tercet-engine")
    on_listening()
    try:
        await asyncio.wait([serving, living], return_when=asyncio.FIRST_COMPLETED)
        if not living.done():  # a signal: what runs has been drained
            await source.cancel() if not context.attached else None
        server.stop()
        await serving
    finally:
        if not living.done():
            if context.attached:
                living.cancel()
            await asyncio.wait([living])
        await context.close()
    if not living.cancelled() and (error := living.exception()) is not None and context.failure is not None:
        raise error
    return 0


async def _live(context: ServerContext, source: EngineSource, on_ready: Callable[[], None]) -> None:
    """Get the engine, then watch it. Ends by raising only."""
    try:
        engine = await source.open()
        await context.attach(engine)
        gc.collect()
        gc.freeze()  # what lives now lives to the end: later collections need not walk it
        context.gc_pauses.install()
        on_ready()
        while not engine.is_stopped:  # noqa: ASYNC110  (seen by a thread, or by nobody who could set an event)
            await asyncio.sleep(_WATCH_S)
        raise ServerFailedError(str(engine.dead_error))
    except TercetError as error:
        if not context.draining:
            context.failure = str(error)
        raise


def route_uvicorn_logs(access_log: bool) -> None:
    """uvicorn's records, errors and accesses, in the form of Tercet's own."""
    uvicorn_logger = logging.getLogger("uvicorn")
    uvicorn_logger.handlers[:] = logging.getLogger("tercet").handlers
    uvicorn_logger.propagate = False
    uvicorn_logger.setLevel(logging.ERROR)
    logging.getLogger("uvicorn.access").setLevel(logging.INFO if access_log else logging.ERROR)
