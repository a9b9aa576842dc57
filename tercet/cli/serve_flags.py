"""The flags of `tercet serve`, in groups. Their values become settings in `serve_settings.py`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tercet.cli.engine_flags import PREFIX
from tercet.config import AsyncEngineArgs
from tercet.engine_flags import add_flags, parse_count

NOT_FLAGS = {
    "model": "an argument of its own",
    "seed": "it is for programs that use LLM; a request without a seed draws one",
}
"""Engine arguments without a flag here, and why."""

# Group -> flag -> arguments of add_argument.
_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "server": {
        "host": {"metavar": "HOST", "help": "address to listen at (default: 127.0.0.1, this machine only)"},
        "port": {"type": int, "metavar": "PORT", "help": "port to listen at; 0 is any (default: 8000)"},
        "uds": {"metavar": "PATH", "help": "listen at a Unix socket, in place of host and port"},
        "root-path": {"metavar": "PATH", "help": "path that a proxy puts before every route"},
        "connect": {
            "metavar": "ADDRESS",
            "help": "serve the engine that listens there (ipc:///path) and start none",
        },
        "api-server-count": {
            "type": int,
            "metavar": "N",
            "help": "API server processes that share the port (default: 1)",
        },
        "config": {"metavar": "FILE", "help": "YAML file of options, by the names of their flags"},
        "shutdown-timeout": {
            "type": float,
            "metavar": "S",
            "help": "seconds that running requests get at the first signal (default: 0, they are ended)",
        },
        "timeout-keep-alive": {
            "type": int,
            "metavar": "S",
            "help": "seconds that an idle connection stays open (default: 5)",
        },
        "enable-access-log": {"bool": True, "help": "log every HTTP request (default: no)"},
    },
    "requests": {
        "chat-template": {
            "metavar": "FILE",
            "help": "Jinja chat template in place of the model's: a file, or the template itself",
        },
        "trust-request-chat-template": {
            "bool": True,
            "help": "take chat templates from requests; they run in a sandbox (default: no)",
        },
        "request-timeout": {
            "type": float,
            "metavar": "S",
            "help": "longest life of a request in seconds; 0 is without end (default: 0)",
        },
        "enable-force-include-usage": {
            "bool": True,
            "help": "end every stream with its usage (default: where asked for)",
        },
        "enable-responses-store": {
            "bool": True,
            "help": "keep responses of /v1/responses in memory, to be retrieved and gone on with (default: no)",
        },
        "sse-keep-alive-interval": {
            "type": float,
            "metavar": "S",
            "help": "send a comment on a stream that was silent for so long; 0 is never (default: 0)",
        },
    },
    "access": {
        "api-key": {
            "nargs": "+",
            "action": "extend",
            "metavar": "KEY",
            "help": "keys of which a request must bear one (default: TERCET_API_KEY, or none)",
        },
        "ssl-certfile": {"metavar": "FILE", "help": "certificate chain; makes it an HTTPS server"},
        "ssl-keyfile": {"metavar": "FILE", "help": "private key, where it is not in the certificate's file"},
        "ssl-ca-certs": {"metavar": "FILE", "help": "certificates that sign those of clients"},
        "ssl-cert-reqs": {
            "type": int,
            "choices": (0, 1, 2),
            "help": "2 asks every client for a certificate (default: 0, none)",
        },
        "ssl-ciphers": {"metavar": "LIST", "help": "ciphers of TLS 1.2, in OpenSSL's notation"},
        "allowed-origins": {
            "json": list,
            "help": "origins whose pages may ask, as a JSON list (default: none)",
        },
        "allowed-methods": {"json": list, "help": "methods that they may use (default: all)"},
        "allowed-headers": {"json": list, "help": "headers that they may send (default: all)"},
        "allow-credentials": {"bool": True, "help": "whether they may send credentials (default: no)"},
        "enable-admin-routes": {
            "bool": True,
            "help": "offer /pause, /resume, /reset_prefix_cache and profiling at --admin-uds (default: no)",
        },
        "admin-uds": {"metavar": "PATH", "help": "Unix socket of the admin routes"},
        "admin-port": {
            "type": int,
            "metavar": "PORT",
            "help": "port of the admin routes on 127.0.0.1, in place of the socket",
        },
    },
    "limits": {
        "max-concurrent-requests": {
            "type": int,
            "metavar": "N",
            "help": "unfinished requests of a server, n counted n times; 0 is no limit (default: 0)",
        },
        "max-waiting-prompt-tokens": {
            "type": parse_count,
            "metavar": "N",
            "help": "prompt tokens of requests that have given nothing yet; 0 is no limit (default: 0)",
        },
        "max-body-bytes-in-flight": {
            "type": parse_count,
            "metavar": "N",
            "help": "bodies of unfinished requests; 0 is no limit (default: 1 GiB)",
        },
        "max-body-bytes": {"type": parse_count, "metavar": "N", "help": "one body (default: 32 MiB)"},
        "max-header-bytes": {
            "type": parse_count,
            "metavar": "N",
            "help": "headers of one request (default: 64 KiB)",
        },
        "max-header-count": {"type": int, "metavar": "N", "help": "headers of one request (default: 256)"},
        "max-url-bytes": {"type": parse_count, "metavar": "N", "help": "one URL (default: 8 KiB)"},
    },
}


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag; those not given leave no trace in the namespace."""
    for title, flags in _FLAGS.items():
        group = parser.add_argument_group(title)
        for name, given in flags.items():
            options = dict(given)
            if options.pop("bool", False):
                options["action"] = argparse.BooleanOptionalAction
            if "json" in options:
                options.pop("json")
                options |= {"type": _json_list, "metavar": "JSON"}
            action = group.add_argument(f"--{name}", default=argparse.SUPPRESS, **options)
            action.help = given["help"]  # without what BooleanOptionalAction adds of a default
    add_flags(parser, AsyncEngineArgs, leave_out=NOT_FLAGS, prefix=PREFIX, with_defaults=False)


def engine_flag(field: str) -> str:
    """The flag of an engine argument."""
    return "--" + field.replace("_", "-")


def _json_list(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"must be a JSON list such as '[\"*\"]'; got {text!r}")
    return value
