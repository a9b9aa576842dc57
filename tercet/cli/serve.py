"""`tercet serve`: the OpenAI-compatible server, with an engine of its own or attached to one.

Flags that were not given are absent from the namespace, so that a file of --config can stand for them; their
defaults are those of the settings.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from tercet.cli.engine_flags import given_engine_flags
from tercet.cli.serve_flags import add_serve_flags, engine_flag
from tercet.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from tercet.frontend.server.settings import ListenSettings, ServerSettings

NAME = "serve"

_FRONTENDS_OWN = ("served_model_name", "disable_log_stats", "enable_log_requests", "otlp_traces_endpoint")
"""Engine flags that a server follows itself, whoever has started its engine."""


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet serve [MODEL] [--port PORT] [options]",
        help="serve a model over HTTP, as OpenAI's API has it",
        description="Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models and more. The port "
        "answers at once; /ready says when the model is loaded. SIGINT (Ctrl-C) or SIGTERM ends it in order, a "
        "second one at once.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="a directory in Hugging Face form, a .gguf file or a hub id (default: the default model)",
    )
    add_serve_flags(parser)
    parser.set_defaults(run=run, serve_parser=parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal (then 0) or until the engine dies (then an error)."""
    from tercet import log

    _check_installed()
    from tercet.cli.serve_settings import check_admin, listen_settings, server_settings

    options = vars(_with_config_file(args))
    log.configure("serve")
    check_admin(options)
    settings, listen = server_settings(options), listen_settings(options)
    if options.get("connect") is not None:
        _check_attached(options)
    if options.get("api_server_count", 1) > 1:
        return _run_fleet(options, settings, listen)
    return _run_one(options, settings, listen)


def _check_installed() -> None:
    for name in ("httptools", "starlette", "uvicorn", "uvloop", "yaml"):
        if importlib.util.find_spec(name) is None:
            raise StartupError(
                f"the server needs {name}, which is not installed: pip install 'tercet[server]'"
            )


def _with_config_file(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments, with those of the --config file where they were not given."""
    path = getattr(args, "config", None)
    if path is None:
        return args
    from tercet.cli.config_file import arguments_of_file

    found = args.serve_parser.parse_args(arguments_of_file(path))
    if getattr(found, "config", None) is not None:
        raise ConfigError("config", "a file of options cannot name another")
    return argparse.Namespace(**{**vars(found), **vars(args)})


def _check_attached(options: dict[str, Any]) -> None:
    refused = ["MODEL"] if options.get("model") is not None else []
    given = given_engine_flags(argparse.Namespace(**options))
    refused += [engine_flag(name) for name in given if name not in _FRONTENDS_OWN]
    if refused:
        problem = f"the engine there is as it was started: leave out {', '.join(refused)}"
        raise ConfigError("connect", problem)


def _logs_stats(options: dict[str, Any]) -> bool:
    return not options.get("engine_disable_log_stats", False)


def _engine_config(options: dict[str, Any]) -> Any:
    from tercet.config import AsyncEngineArgs

    given = given_engine_flags(argparse.Namespace(**options))
    return AsyncEngineArgs(model=options.get("model"), **given).create_engine_config()


def _run_one(options: dict[str, Any], settings: ServerSettings, listen: ListenSettings) -> int:
    """One process that is API server and, unless it attaches, the engine's parent."""
    from tercet.frontend.server.context import ServerContext
    from tercet.frontend.server.engines import AttachedEngine, EngineSource, OwnEngine
    from tercet.frontend.server.runner import route_uvicorn_logs, run_server
    from tercet.frontend.server.serving import ApiServer, bind, bind_admin, run_loop, url_of
    from tercet.frontend.status_line import StatusLine

    route_uvicorn_logs(listen.access_log)
    connect = options.get("connect")
    config = _engine_config(options) if connect is None else None
    context = ServerContext(settings)
    sock, admin_sock = bind(listen), bind_admin(listen)
    url = url_of(listen, sock)
    with StatusLine() as status:
        source: EngineSource
        if config is None:
            source = AttachedEngine(str(connect), log_stats=_logs_stats(options))
        else:
            source = OwnEngine(config, tell=status.show, log_stats=_logs_stats(options))

        def ready() -> None:
            status.clear()
            print(f"serving {context.model_names[0]} at {url}", flush=True)

        async def serve() -> int:
            server = ApiServer(context, listen, sock, admin_sock)
            return await run_server(server, context, source, on_ready=ready)

        return run_loop(serve)


def _run_fleet(options: dict[str, Any], settings: ServerSettings, listen: ListenSettings) -> int:
    """A parent of engine and API servers, which itself serves nothing."""
    from tercet.cli.serve_fleet import run_fleet

    connect = options.get("connect")
    config = _engine_config(options) if connect is None else None
    count = options["api_server_count"]
    log_stats = _logs_stats(options)
    return run_fleet(settings, listen, count, config=config, address=connect, log_stats=log_stats)
