"""What the routes of one server share: its engine, once there is one, its settings, and what is in progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from tercet.errors import EngineError
from tercet.frontend.async_llm import AsyncLLM
from tercet.frontend.chat_template import compile_chat_template
from tercet.frontend.server.admission import Admission
from tercet.frontend.server.errors import ApiError, unavailable
from tercet.frontend.server.guard import Ended, Guard
from tercet.frontend.server.metrics import watch
from tercet.frontend.server.response_store import MemoryStore, ResponseStore
from tercet.frontend.server.settings import ServerSettings
from tercet.frontend.server.token_bytes import BytesOf, bytes_of_text, make_bytes_of
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.tracing import make_tracer
from tercet.gc_pauses import GcPauses

RENDER_THREADS: Final = 2  # for chat templates, beside the engine's that tokenize
SILENT_S: Final = 3.0  # heartbeats come each second
STALLED_S: Final = 30.0  # a step of a long prompt may take seconds on a CPU


class Progress(msgspec.Struct, frozen=True):
    """How far the start has come. `done` of `total` where the phase has a measure."""

    phase: str
    done: int = 0
    total: int = 0


class ServerContext:
    """State of one API server.

    Attributes:
        settings: as given.
        admission: counts of unfinished work.
        guards: one for each request in progress.
        draining: whether the server is leaving; it takes no new requests then.
        start_progress: what the engine's start is doing, while there is no engine yet.
        failure: why the engine could not start; None otherwise.
        gc_pauses: of this process, where it is the server's own and installs it.
        tracer: of requests, where they are traced.
        created_s: time.time() of the server's start, which models bear.
        responses: stored responses; None where none are kept.
        bytes_of: the bytes of the model's tokens.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.admission = Admission(settings.admission)
        self.guards: set[Guard] = set()
        self.draining = False
        self.start_progress: Callable[[], Progress] = lambda: Progress("starting")
        self.failure: str | None = None
        self.created_s = int(time.time())
        self.responses: ResponseStore | None = MemoryStore() if settings.enable_responses_store else None
        self.render_pool = ThreadPoolExecutor(RENDER_THREADS, thread_name_prefix="tercet-render")
        self.gc_pauses = GcPauses()
        self.tracer = make_tracer(
            settings.otlp_traces_endpoint
        )  # an error of the operator's, so found at the start
        self.bytes_of: BytesOf = bytes_of_text
        self._engine: AsyncLLM | None = None
        self._tokenizer: Tokenizer | None = None
        self._num_requests = 0
        if settings.chat_template is not None:
            compile_chat_template(settings.chat_template)  # an error of the operator's, so found at the start

    async def attach(self, engine: AsyncLLM) -> None:
        """Serve this engine from now on.

        Raises:
            EngineError: it is gone.
        """
        await engine.start()
        if engine.has_tokenizer:
            self._tokenizer = await engine.get_tokenizer()
            self.bytes_of = make_bytes_of(self._tokenizer)
        watch(engine.observer, self)
        self._engine = engine

    @property
    def engine(self) -> AsyncLLM:
        """The engine.

        Raises:
            ApiError: 503, it is still loading, or has died.
        """
        if self._engine is None:
            raise unavailable("the engine is still starting", "engine_starting")
        if self._engine.is_stopped:
            raise unavailable("the engine is not available", "engine_unavailable")
        return self._engine

    @property
    def attached(self) -> bool:
        return self._engine is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """
        Raises:
            ApiError: 400, the engine takes token ids only; 503 as `engine`.
        """
        self.engine  # noqa: B018  (raises while there is none)
        if self._tokenizer is None:
            raise ApiError(400, "this engine has no tokenizer: it takes token ids only", code="no_tokenizer")
        return self._tokenizer

    @property
    def model_names(self) -> list[str]:
        """Names that the model goes by, the first one being that which responses bear."""
        return list(self.settings.served_model_names) or self.engine.model_info.served_names

    def check_model(self, name: str | None) -> str:
        """The name for the response; a request without one means the only model.

        Raises:
            ApiError: 404, there is no such model.
        """
        names = self.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {', '.join(names)}",
                param="model",
                code="model_not_found",
            )
        return name

    def check_open(self) -> None:
        """
        Raises:
            ApiError: 503, the server is leaving.
        """
        if self.draining:
            raise unavailable("the server is shutting down", "shutting_down")

    def next_number(self) -> int:
        """Distinct for each request of this server."""
        self._num_requests += 1
        return self._num_requests

    # ---- health

    def problem(self) -> str | None:
        """Why no traffic should be sent here; None where it may. From heartbeats: the engine is not asked."""
        if self.draining:
            return "draining"
        if self.failure is not None:
            return "failed"
        if self._engine is None:
            return "starting"
        if self._engine.is_stopped:
            return "dead"
        if self._engine.pulse.silent_s > SILENT_S:
            return "silent"
        if self._engine.pulse.stalled_s > STALLED_S:
            return "stalled"
        return "full" if self.admission.is_full else None

    @property
    def alive(self) -> bool:
        """Whether this process does its work, or may yet: False only where it cannot recover."""
        return self.failure is None and (self._engine is None or not self._engine.errored)

    # ---- the end

    def end_all(self, reason: Ended) -> None:
        """End every request in progress; its client is told why."""
        for guard in list(self.guards):
            guard.end(reason)
        if self.responses is not None:
            self.responses.cancel_all()

    async def close(self) -> None:
        """Leave the engine, stopping it where it is this server's own."""
        self.render_pool.shutdown(wait=False, cancel_futures=True)
        engine, self._engine = self._engine, None
        if engine is not None:
            try:
                await engine.aclose()
            except EngineError:
                pass
