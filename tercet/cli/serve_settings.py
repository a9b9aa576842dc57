"""From the flags of `tercet serve` to the settings of a server, checked before anything is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tercet import envs
from tercet.errors import ConfigError
from tercet.frontend.server.limits import HttpLimits
from tercet.frontend.server.serving import check_tls
from tercet.frontend.server.settings import (
    AdmissionLimits,
    CorsSettings,
    ListenSettings,
    ServerSettings,
    TlsSettings,
)

_CERT_REQUIRED = 2


def server_settings(options: dict[str, Any]) -> ServerSettings:
    """
    Args:
        options: flags that were given, by name.

    Raises:
        ConfigError: a value cannot work.
    """
    names = options.get("engine_served_model_name") if options.get("connect") is not None else None
    return ServerSettings(
        api_keys=tuple(_api_keys(options)),
        served_model_names=tuple(names or ()),
        chat_template=_chat_template(options.get("chat_template")),
        cors=_cors(options),
        limits=HttpLimits(**_given(options, *HttpLimits.__struct_fields__)),
        admission=AdmissionLimits(
            **_given(options, "max_waiting_prompt_tokens", "max_body_bytes_in_flight"),
            **_renamed(options, max_concurrent_requests="max_requests"),
        ),
        **_given(
            options,
            "trust_request_chat_template",
            "enable_force_include_usage",
            "enable_responses_store",
            "root_path",
        ),
        **_renamed(
            options,
            request_timeout="request_timeout_s",
            sse_keep_alive_interval="sse_keep_alive_s",
            engine_enable_log_requests="log_requests",
            engine_otlp_traces_endpoint="otlp_traces_endpoint",
        ),
    )


def listen_settings(options: dict[str, Any]) -> ListenSettings:
    """As `server_settings`."""
    count = options.get("api_server_count", 1)
    if not 1 <= count <= 1024:
        raise ConfigError("api_server_count", f"must be in [1, 1024]; got {count}")
    if options.get("enable_responses_store") and count > 1:
        problem = "a server keeps its own responses, of which others know nothing; run one API server"
        raise ConfigError("enable_responses_store", problem)
    if options.get("uds") is not None:
        if count > 1:
            raise ConfigError("api_server_count", "several servers cannot share a Unix socket; give a port")
        for name in ("host", "port"):
            if name in options:
                raise ConfigError(name, "goes with TCP; leave it out beside uds")
    for name in ("port", "admin_port"):
        if not 0 <= (options.get(name) or 0) < 65536:
            raise ConfigError(name, f"must be in [0, 65535]; got {options[name]}")
    timeout_s = options.get("shutdown_timeout", 0.0)
    if not 0 <= timeout_s < 1e6:
        raise ConfigError("shutdown_timeout", f"must be 0 or more seconds; got {timeout_s}")
    if options.get("timeout_keep_alive", 5) < 1:
        raise ConfigError("timeout_keep_alive", "must be 1 second or more")
    return ListenSettings(
        **_given(options, "host", "port", "uds", "admin_uds", "admin_port"),
        **_renamed(
            options,
            shutdown_timeout="shutdown_timeout_s",
            timeout_keep_alive="keep_alive_s",
            enable_access_log="access_log",
        ),
        reuse_port=count > 1,
        tls=_tls(options),
    )


def check_admin(options: dict[str, Any]) -> None:
    """
    Raises:
        ConfigError: the flags of the admin routes do not go together.
    """
    places = [name for name in ("admin_uds", "admin_port") if options.get(name) is not None]
    if options.get("enable_admin_routes"):
        if not places:
            raise ConfigError("enable_admin_routes", "needs --admin-uds PATH, or --admin-port PORT")
        if len(places) > 1:
            raise ConfigError("admin_port", "goes in place of admin_uds; give one")
    elif places:
        raise ConfigError(places[0], "goes with --enable-admin-routes only")


def _cors(options: dict[str, Any]) -> CorsSettings:
    names = ("allowed_origins", "allowed_methods", "allowed_headers")
    lists: dict[str, Any] = {name: tuple(options[name]) for name in names if name in options}
    return CorsSettings(**lists, **_given(options, "allow_credentials"))


def _given(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _renamed(options: dict[str, Any], **names: str) -> dict[str, Any]:
    return {new: options[old] for old, new in names.items() if old in options}


def _api_keys(options: dict[str, Any]) -> list[str]:
    if "api_key" in options:
        return list(options["api_key"])
    return [envs.TERCET_API_KEY] if envs.TERCET_API_KEY else []


def _chat_template(given: str | None) -> str | None:
    """Source of a template that was given as a file or as itself."""
    if given is None:
        return None
    try:
        return Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if "{{" in given or "{%" in given:
            return given
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("chat_template", f"{given} cannot be read: {why}") from None


def _tls(options: dict[str, Any]) -> TlsSettings | None:
    if options.get("ssl_certfile") is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"):
            if options.get(name):
                raise ConfigError(name, "goes with --ssl-certfile only")
        return None
    reqs = options.get("ssl_cert_reqs", 0)
    if reqs == 1:
        raise ConfigError("ssl_cert_reqs", "1 (optional) protects nothing; give 0 or 2")
    if reqs == _CERT_REQUIRED and options.get("ssl_ca_certs") is None:
        raise ConfigError("ssl_cert_reqs", "2 needs --ssl-ca-certs, to know whose certificates to accept")
    tls = TlsSettings(
        certfile=options["ssl_certfile"],
        keyfile=options.get("ssl_keyfile"),
        ca_certs=options.get("ssl_ca_certs"),
        require_client_cert=reqs == _CERT_REQUIRED,
        ciphers=options.get("ssl_ciphers"),
    )
    check_tls(tls)
    return tls
