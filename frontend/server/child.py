"""An API server's process that a fleet has started: it attaches to the fleet's engine."""

from __future__ import annotations

import msgspec

from tercet import log
from tercet.errors import TercetError
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.engines import AttachedEngine
from tercet.frontend.server.runner import route_uvicorn_logs, run_server
from tercet.frontend.server.serving import ApiServer, bind, bind_admin, run_loop
from tercet.frontend.server.settings import ListenSettings, ServerSettings
from tercet.ipc.child import ChildProcess, Failed, Ready
from tercet.log import get_logger

logger = get_logger(__name__)


class ChildConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one of several API servers is started with."""

    name: str
    settings: ServerSettings
    listen: ListenSettings
    address: str  # of the engine
    log_stats: bool
    progress_path: str | None = None  # None: the engine runs already


def main(child: ChildProcess) -> int:
    """Serve; returns the exit code."""
    config = msgspec.msgpack.decode(child.config, type=ChildConfig)
    log.configure(config.name)
    route_uvicorn_logs(config.listen.access_log)
    try:
        return run_loop(lambda: _serve(config, child))
    except TercetError as error:
        logger.error("%s", error)
        child.report(Failed(str(error)))
        return 1


async def _serve(config: ChildConfig, child: ChildProcess) -> int:
    context = ServerContext(config.settings)
    server = ApiServer(context, config.listen, bind(config.listen), bind_admin(config.listen))
    source = AttachedEngine(
        config.address,
        wait=config.progress_path is not None,
        progress_path=config.progress_path,
        log_stats=config.log_stats,
    )
    return await run_server(server, context, source, on_listening=lambda: child.report(Ready()))
