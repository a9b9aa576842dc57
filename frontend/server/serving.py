"""Running the application: sockets, TLS, the event loop, signals, and leaving in order.

bind ─▶ serve (503 while the engine loads) ─▶ attach ─▶ … ─▶ first signal: stop listening, drain,
                                                              end what is left with a last word, leave
                                                           ─▶ second signal: gone at once
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvicorn
import uvloop

from tercet.errors import ConfigError
from tercet.frontend.server.app import make_admin_app, make_app
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.guard import Ended
from tercet.frontend.server.http_protocol import protocol_class
from tercet.frontend.server.settings import ListenSettings, TlsSettings
from tercet.log import get_logger

logger = get_logger(__name__)

BACKLOG = 2048
LAST_WORDS_S = 3.0
"""For every ended request to send its last word and for its connection to close."""


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: one place decides how this process ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(listen: ListenSettings) -> socket.socket:
    """The socket for the main application, bound and not yet listening.

    Raises:
        ConfigError: the address cannot be had.
    """
    if listen.uds is not None:
        return bind_unix(listen.uds, "uds")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError("host", f"{listen.host!r} is no address of this machine ({error})") from None
    sock = socket.socket(family, kind, proto)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listen.reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind(address)
    except OSError as error:
        sock.close()
        where = f"{listen.host}:{listen.port}"
        raise ConfigError(
            "port", f"{where} cannot be listened at: {error.strerror}; choose another"
        ) from None
    return sock


def bind_unix(path: str, field: str) -> socket.socket:
    """A Unix socket that only this user can connect to. A socket that nobody serves any more is replaced.

    Raises:
        ConfigError: the path is taken, or cannot be.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        _remove_dead(path, field)
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ConfigError(field, f"{path} cannot be made: {error.strerror or error}") from None
    finally:
        os.umask(before)
    return sock


def bind_admin(listen: ListenSettings) -> socket.socket | None:
    """The socket for the admin routes; None where they are off.

    Raises:
        ConfigError: as `bind`.
    """
    if listen.admin_uds is not None:
        return bind_unix(listen.admin_uds, "admin_uds")
    if listen.admin_port is not None:
        return bind(ListenSettings(port=listen.admin_port))
    return None


def _remove_dead(path: str, field: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(field, f"{path} exists and is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise ConfigError(field, f"{path} is in use: another server listens there")


def check_tls(tls: TlsSettings) -> None:
    """
    Raises:
        ConfigError: a file is missing or does not fit.
    """
    try:
        uvicorn.config.create_ssl_context(**_tls_options(tls), ssl_version=ssl.PROTOCOL_TLS_SERVER)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "ssl_certfile", f"the TLS files cannot be used: {error.strerror or error}"
        ) from None


def _tls_options(tls: TlsSettings) -> dict[str, Any]:
    return {
        "certfile": tls.certfile,
        "keyfile": tls.keyfile,
        "password": tls.keyfile_password,
        "ca_certs": tls.ca_certs,
        "cert_reqs": ssl.CERT_REQUIRED if tls.require_client_cert else ssl.CERT_NONE,
        "ciphers": tls.ciphers,
    }


class ApiServer:
    """One API server: its application, its sockets and its end.

    Args:
        context: shared with the application.
        sock: from `bind`.
        admin_sock: for the admin routes; None where they are off.
    """

    def __init__(
        self,
        context: ServerContext,
        listen: ListenSettings,
        sock: socket.socket,
        admin_sock: socket.socket | None = None,
    ) -> None:
        self._context = context
        self._listen = listen
        self._servers = [(self._make(make_app(context), listen.tls), sock)]
        if admin_sock is not None:
            self._servers.append((self._make(make_admin_app(context), None), admin_sock))
        self._paths = [one.getsockname() for _, one in self._servers if one.family == socket.AF_UNIX]
        for _, one in self._servers:
            one.listen(BACKLOG)  # whoever connects from now on is answered, if not at once
        self._stopping = asyncio.Event()

    def _make(self, app: Any, tls: TlsSettings | None) -> _Server:
        listen = self._listen
        options: dict[str, Any] = {}
        if tls is not None:
            options = {f"ssl_{name}": value for name, value in _tls_options(tls).items()}
            options["ssl_keyfile_password"] = options.pop("ssl_password")
        return _Server(
            uvicorn.Config(
                app,
                http=protocol_class(self._context.settings.limits),
                loop="none",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=listen.access_log,
                server_header=False,
                timeout_keep_alive=listen.keep_alive_s,
                backlog=BACKLOG,
                root_path=self._context.settings.root_path,
                **options,
            )
        )

    def stop(self) -> None:
        """Begin to leave: no new requests, and those in progress get the shutdown timeout."""
        self._context.draining = True
        self._stopping.set()

    async def run(self) -> None:
        """Serve until `stop`, then until everything has ended."""
        tasks = [
            asyncio.create_task(server.serve(sockets=[sock]), name="tercet-http")
            for server, sock in self._servers
        ]
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        self._context.draining = True
        for server, _ in self._servers:
            server.should_exit = True
        await self._drain(tasks)
        for path in self._paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
        for task in tasks:
            await task

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        _, left = await asyncio.wait(tasks, timeout=self._listen.shutdown_timeout_s or 0.001)
        if left:
            if self._context.guards:
                logger.info("ending %d requests", len(self._context.guards))
            self._context.end_all(Ended.SHUTDOWN)
            _, left = await asyncio.wait(tasks, timeout=LAST_WORDS_S)
        for server, _ in self._servers:
            server.force_exit = True


def run_loop(main: Callable[[], Awaitable[int]]) -> int:
    """Run a server's main coroutine on uvloop; returns its exit code."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def call() -> int:
            return await main()

        return runner.run(call())


def on_signals(stop: Callable[[], None]) -> None:
    """Call `stop` at the first SIGINT or SIGTERM of this process; a second one ends it at once.

    What this process has started sees by its end that it is gone.
    """
    asked = False

    def handle(number: int) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        sys.stderr.write("tercet: stopping; a second signal stops at once\n")
        stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)


def url_of(listen: ListenSettings, sock: socket.socket) -> str:
    """Where the main application is found, as a user types it."""
    if listen.uds is not None:
        return f"unix:{listen.uds}"
    host, port = sock.getsockname()[:2]
    scheme = "https" if listen.tls is not None else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
