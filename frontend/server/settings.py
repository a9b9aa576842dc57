"""What an API server is started with. A tree of frozen structs, for it may cross to a child process."""

from __future__ import annotations

import msgspec

from tercet.errors import ConfigError
from tercet.frontend.server.limits import HttpLimits


class AdmissionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much unfinished work one API server takes on. Beyond it: 429 with Retry-After. 0 is no limit.

    Attributes:
        max_requests: unfinished requests, n and every prompt of a list counted.
        max_waiting_prompt_tokens: prompt tokens of requests that have given nothing yet. For text, whose tokens
            are known only after tokenizing, one for each 16 bytes is counted before.
        max_body_bytes_in_flight: bodies of unfinished requests.
    """

    max_requests: int = 0
    max_waiting_prompt_tokens: int = 0
    max_body_bytes_in_flight: int = 1 << 30

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if getattr(self, name) < 0:
                raise ConfigError(name, f"must be 0 (no limit) or more; got {getattr(self, name)!r}")


class CorsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Cross-origin requests of browsers; none are allowed where there is no origin."""

    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the application behaves.

    Attributes:
        api_keys: any of them opens every route; none leaves all open.
        served_model_names: in place of the engine's.
        chat_template: Jinja source, in place of the model's.
        trust_request_chat_template: take a `chat_template` from requests.
        request_timeout_s: longest life of a request; 0 is without end.
        sse_keep_alive_s: a comment is sent on a stream that was silent for so long; 0 is never.
        enable_force_include_usage: streams end with their usage even if not asked to.
        enable_responses_store: keep responses of /v1/responses, in this server's memory.
        log_requests: log who asked for what (id, model, user, size), and a record of each request that has ended.
        otlp_traces_endpoint: URL of a collector that gets a trace of each request.
    """

    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    request_timeout_s: float = 0.0
    sse_keep_alive_s: float = 0.0
    enable_force_include_usage: bool = False
    enable_responses_store: bool = False
    log_requests: bool = False
    otlp_traces_endpoint: str | None = None
    root_path: str = ""
    cors: CorsSettings = CorsSettings()
    limits: HttpLimits = HttpLimits()
    admission: AdmissionLimits = AdmissionLimits()

    def __post_init__(self) -> None:
        if any(not key for key in self.api_keys):
            raise ConfigError("api_key", "must not be empty")
        for name in ("request_timeout_s", "sse_keep_alive_s"):
            if not 0 <= getattr(self, name) < 1e9:
                raise ConfigError(name, f"must be 0 or more seconds; got {getattr(self, name)!r}")


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Files of a TLS server. `ca_certs` with `require_client_cert` is mutual TLS."""

    certfile: str
    keyfile: str | None = None
    keyfile_password: str | None = None
    ca_certs: str | None = None
    require_client_cert: bool = False
    ciphers: str | None = None


class ListenSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the server listens and how it leaves.

    Attributes:
        uds: path of a Unix socket, in place of host and port.
        admin_uds, admin_port: where the admin routes listen; the port on 127.0.0.1.
        shutdown_timeout_s: how long a first signal lets running requests go on.
        keep_alive_s: how long an idle connection stays open.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    admin_uds: str | None = None
    admin_port: int | None = None
    reuse_port: bool = False
    shutdown_timeout_s: float = 0.0
    keep_alive_s: int = 5
    access_log: bool = False
    tls: TlsSettings | None = None
