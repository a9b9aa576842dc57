"""`AsyncLLM`: an engine for code that runs on an asyncio event loop, its own or attached to.

A guest in the process that uses it: no signal handler, no environment variable, no event-loop policy, no
thread or process that outlives `shutdown`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias, TypeVar

from tercet.config import AsyncEngineArgs, EngineArgs
from tercet.errors import EngineClosedError, EngineDeadError, EngineError, TercetError, ValidationError
from tercet.frontend.client import CoreClient
from tercet.frontend.connecting import Connecting
from tercet.frontend.drain import wait_until_idle
from tercet.frontend.engine_end import death_notice, is_running_loop, release
from tercet.frontend.input_processor import (
    InputProcessor,
    PreparedRequest,
    checked_params,
    make_processor,
)
from tercet.frontend.inputs import ParsedPrompt, PromptType, parse_prompt
from tercet.frontend.launcher import EngineProcesses
from tercet.frontend.metrics import Metric
from tercet.frontend.model_config import ModelConfig
from tercet.frontend.observing import Observer
from tercet.frontend.output_processor import RequestState
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.pulse import Pulse
from tercet.frontend.sampling_params import SamplingParams
from tercet.frontend.stream import RequestStream
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.tracing import RequestTracer, make_tracer
from tercet.frontend.validation import check_profile_prefix, check_request_ids, check_str
from tercet.ipc.messages import (
    Limits,
    ModelInfo,
    PauseGeneration,
    PauseMode,
    ResetPrefixCache,
    ResumeGeneration,
    StartProfile,
    Stats,
    StopProfile,
)
from tercet.ipc.telemetry import Metrics
from tercet.log import get_logger

logger = get_logger(__name__)

TOKENIZE_THREADS: Final = 2  # of each frontend; the tokenizer releases the interpreter lock
HANDSHAKE_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 5.0
T = TypeVar("T")
_PAUSE_MODES: Final = {"abort": PauseMode.ABORT, "wait": PauseMode.WAIT, "keep": PauseMode.KEEP}


@dataclass(slots=True)
class NewRequest:
    """One request of `AsyncLLM.add_requests`; see `AsyncLLM.generate` for the fields.

    `default_seed` is used where `params` has none; None draws one at random.
    """

    prompt: PromptType
    params: SamplingParams
    request_id: str | None = None
    priority: int = 0
    default_seed: int | None = None
    trace_headers: Mapping[str, str] | None = None


_Opened: TypeAlias = tuple[RequestState, ParsedPrompt, NewRequest]


class AsyncLLM:
    """An engine whose requests are awaited. Make one with `from_engine_args` or `connect`.

    It belongs to the event loop of its first asynchronous call. Use it as `async with`, or call `shutdown`.
    In a forked child it does nothing but raise EngineClosedError, and its end leaves the parent's engine alone.
    """

    def __init__(
        self,
        address: str,
        *,
        processes: EngineProcesses | None = None,
        enable_log_requests: bool = False,
        log_stats: bool = False,
        tracer: RequestTracer | None = None,
        handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    ) -> None:
        """
        Args:
            address: where the engine's core listens.
            processes: the running engine, if it is this object's to stop.
            enable_log_requests: log a record of each request when it has ended.
            log_stats: log the engine's state every 10 s while it works.
            tracer: makes spans of requests; closed with this object.
            handshake_timeout_s: for the core to answer.
        """
        self._client = CoreClient(address)
        self._processes = processes
        self._observer = Observer(
            self._client, log_requests=enable_log_requests, log_stats=log_stats, tracer=tracer
        )
        self._handshake_timeout_s = handshake_timeout_s
        self._pool = ThreadPoolExecutor(TOKENIZE_THREADS, thread_name_prefix="tercet-tokenize")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._processor: InputProcessor | None = None
        self._paused = False
        if processes is not None:
            processes.on_death = death_notice(weakref.ref(self._client))
        self._release = weakref.finalize(self, release, self._client, processes, self._pool)

    # ---- start and stop

    @classmethod
    def from_engine_args(
        cls, engine_args: EngineArgs, *, progress: Callable[[str], None] | None = None
    ) -> AsyncLLM:
        """Start an engine of one's own; returns once it takes requests.

        Args:
            progress: told, from another thread, what the start is doing; logged where None.

        Blocks for as long as the model loads, so from a running event loop call it through
        `asyncio.to_thread`.

        Raises:
            ConfigError: an argument cannot work.
            ModelNotFoundError, UnsupportedModelError: there is no model that could run.
            StartupError: a process could not start; nothing is left running.
        """
        config = engine_args.create_engine_config()
        tracer = make_tracer(engine_args.otlp_traces_endpoint)
        processes = EngineProcesses(config, progress=progress or logger.info)
        try:
            processes.start()
        except BaseException:
            processes.stop()
            raise
        return cls(
            processes.address,
            processes=processes,
            enable_log_requests=isinstance(engine_args, AsyncEngineArgs) and engine_args.enable_log_requests,
            log_stats=not engine_args.disable_log_stats,
            tracer=tracer,
        )

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        timeout_s: float = HANDSHAKE_TIMEOUT_S,
        enable_log_requests: bool = False,
        log_stats: bool = False,
        otlp_traces_endpoint: str | None = None,
    ) -> Connecting:
        """Attach to a running engine; the address (`ipc:///path`) is all that is needed.

            async with AsyncLLM.connect(address) as engine: ...
            engine = await AsyncLLM.connect(address)

        Closing leaves the engine running. Raises ConfigError if no engine listens there, EngineError if it
        does not answer within `timeout_s` or speaks another protocol.
        """
        engine = cls(
            address,
            handshake_timeout_s=timeout_s,
            enable_log_requests=enable_log_requests,
            log_stats=log_stats,
            tracer=make_tracer(otlp_traces_endpoint),
        )
        return Connecting(engine)

    async def start(self) -> None:
        """Attach to the core on the running event loop. Every other method does so where it must.

        Raises:
            EngineError: the engine is gone, or this is not the event loop on which it was started.
        """
        self._client.check_process()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise EngineError("this engine belongs to another event loop; use one engine for each loop")
        if self._processor is None:
            self._client.check()
            if self._starting is None:
                self._starting = loop.create_task(self._start(), name="tercet-start")
            # Shielded: the first of several callers may be cancelled, and the others still wait.
            await asyncio.shield(self._starting)

    async def _start(self) -> None:
        try:
            welcome = await self._client.connect(
                sys.argv[0].removesuffix("/__main__.py").rpartition("/")[2] or "python",
                self._handshake_timeout_s,
                watch_process=self._processes is None,
            )
            assert self._loop is not None
            self._processor = await self._loop.run_in_executor(self._pool, make_processor, welcome)
        finally:
            self._starting = None

    def shutdown(self, timeout: float | None = None) -> None:
        """Abort what is unfinished, leave the engine and, if it is one's own, end its processes. Idempotent.

        May be called from any thread, and after the event loop has ended. Blocks until all is gone; on an
        event loop prefer `aclose`.

        Args:
            timeout: seconds that the processes get to leave by themselves; None is 5.
        """
        if self._client.is_forked:
            return
        self._close_client()
        self._release.detach()
        if self._processes is not None:
            self._processes.stop(STOP_TIMEOUT_S if timeout is None else timeout)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._observer.close()

    async def aclose(self) -> None:
        """As `shutdown()`, without holding up the event loop."""
        if self._client.is_forked:
            return
        self._close_client()
        # An executor of our own: the loop's default one would keep a thread after us.
        with ThreadPoolExecutor(1, thread_name_prefix="tercet-shutdown") as executor:
            await asyncio.get_running_loop().run_in_executor(executor, self.shutdown)

    def _close_client(self) -> None:
        loop = self._loop
        if loop is None or not loop.is_running() or is_running_loop(loop):
            self._client.close()
            return
        done = threading.Event()

        def close() -> None:
            self._client.close()
            done.set()

        try:
            loop.call_soon_threadsafe(close)
        except RuntimeError:  # closed meanwhile
            self._client.close()
            return
        while not done.wait(0.1) and loop.is_running():
            pass

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    # ---- requests

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        trace_headers: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate, yielding outputs as they come; one's own pace only merges them.

        Closing or cancelling the generator aborts the request.

        Args:
            prompt: text, token ids, or a dict of either with options.
            sampling_params: copied; later changes have no effect.
            request_id: unique among unfinished requests; drawn where None.
            priority: lower runs earlier, with scheduling_policy='priority'.
            trace_headers: of the caller; a W3C `traceparent` among them is the parent of the request's span.

        Raises:
            ValidationError: a field is wrong; names it. Nothing was sent.
            QueueFullError: the engine takes no more now.
            RequestError: this request failed.
            EngineDeadError, EngineClosedError: there is no engine any more.
        """
        stream = await self.add_request(
            prompt, sampling_params, request_id, priority=priority, trace_headers=trace_headers
        )
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def add_request(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        add_special_tokens: bool = True,
        trace_headers: Mapping[str, str] | None = None,
    ) -> RequestStream:
        """As `generate`, with the stream in the caller's hands: whoever drops it unread calls its `close`.

        Args:
            add_special_tokens: for text: add what the model expects around it; False for rendered chats.
        """
        request = NewRequest(prompt, sampling_params, request_id, priority, trace_headers=trace_headers)
        return (await self.add_requests([request], add_special_tokens=add_special_tokens))[0]

    async def add_requests(
        self, requests: Sequence[NewRequest], *, add_special_tokens: bool = True
    ) -> list[RequestStream]:
        """As `add_request`, for several at once: all are sent, in order, or none."""
        arrival_s = time.time()
        if self._processor is None or self._loop is not asyncio.get_running_loop():
            await self.start()
        self._client.check()
        outputs = self._client.outputs
        streams: list[RequestStream] = []
        try:
            opened = [self._open(request, arrival_s, streams) for request in requests]
            prepared = await self._prepare(opened, arrival_s, add_special_tokens)
            for (state, *_), ready in zip(opened, prepared, strict=True):
                if not state.finished:  # or it was aborted meanwhile
                    handle = outputs.admit(state, ready)
                    self._client.add(ready.message(self._client.epoch, handle, state.trace))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams

    def _open(self, request: NewRequest, arrival_s: float, streams: list[RequestStream]) -> _Opened:
        params, parsed = checked_params(request.params), parse_prompt(request.prompt)
        given = request.request_id
        request_id = uuid.uuid4().hex if given is None else check_str("request_id", given)
        request = dataclasses.replace(request, params=params)
        state = self._client.outputs.open(request_id, params, arrival_s)
        assert self._loop is not None
        streams.append(RequestStream(state, self._client.outputs, self._loop))
        self._observer.opened(state, params, request.trace_headers)
        return state, parsed, request

    async def _prepare(
        self, opened: Sequence[_Opened], arrival_s: float, add_special_tokens: bool
    ) -> list[PreparedRequest]:
        processor = self._started()

        def prepare() -> list[PreparedRequest]:
            return [
                processor.prepare(
                    parsed,
                    request.params,
                    arrival_s=arrival_s,
                    priority=request.priority,
                    add_special_tokens=add_special_tokens,
                    default_seed=request.default_seed,
                )
                for _, parsed, request in opened
            ]

        if any(processor.needs_thread(parsed) for _, parsed, *_ in opened):
            return await self._run_in_thread(prepare)
        return prepare()

    async def _run_in_thread(self, function: Callable[[], T]) -> T:
        """Run in the pool that tokenizes."""
        assert self._loop is not None
        try:
            future = self._loop.run_in_executor(self._pool, function)
        except RuntimeError:  # the pool is shut down
            raise EngineClosedError("the engine was shut down on this side") from None
        return await future

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests: their streams give what they have, with finish_reason 'abort'. Unknown ids pass.

        Raises:
            ValidationError: it is neither a request id nor several.
        """
        ids = check_request_ids("request_id", request_id)
        await self.start()
        for one in ids:
            if (request := self._client.outputs.requests.get(one)) is not None:
                self._client.outputs.abort(request)

    def get_num_unfinished_requests(self) -> int:
        """Requests of this frontend that are not finished."""
        self._client.check_process()
        return len(self._client.outputs.requests)

    # ---- the engine's state

    @property
    def is_running(self) -> bool:
        """Whether requests can be made."""
        return self._client.dead_error is None

    @property
    def is_stopped(self) -> bool:
        return not self.is_running

    @property
    def errored(self) -> bool:
        """Whether the engine has died (and was not merely shut down on this side)."""
        return isinstance(self._client.dead_error, EngineDeadError)

    @property
    def dead_error(self) -> TercetError:
        """What every further call raises; an EngineDeadError without a cause while the engine runs."""
        return self._client.dead_error or EngineDeadError("the engine is running")

    async def check_health(self) -> None:
        """Return at once if the engine lives; it is known from heartbeats and process ends, not asked.

        Raises:
            EngineDeadError, EngineClosedError: it does not.
        """
        if self._client.dead_error is None:
            await self.start()
        self._client.check()

    @property
    def pulse(self) -> Pulse:
        """What heartbeats have told of the engine so far; nothing is asked of it."""
        return self._client.pulse

    @property
    def model_info(self) -> ModelInfo:
        """The model's name, context length, vocabulary and so on.

        Raises:
            EngineError: not started yet.
        """
        return self._started().model

    @property
    def model_config(self) -> ModelConfig:
        """The model under vLLM's names. Known before `start` for an engine of one's own; else as `model_info`."""
        if self._processor is None and self._processes is not None:
            return ModelConfig.of_engine(self._processes.config)
        return ModelConfig.of_attached(self.model_info, self.limits)

    async def get_model_config(self) -> ModelConfig:
        """`model_config`, once attached."""
        await self.start()
        return self.model_config

    async def get_supported_tasks(self) -> tuple[str, ...]:
        """What the engine can be asked for: ('generate',)."""
        return ("generate",)

    async def is_tracing_enabled(self) -> bool:
        """Whether requests are traced through OpenTelemetry."""
        return self._observer.tracer is not None

    @property
    def limits(self) -> Limits:
        """What the engine accepts. Raises as `model_info`."""
        return self._started().limits

    @property
    def has_tokenizer(self) -> bool:
        """Whether the engine takes and gives text. Raises as `model_info`."""
        return self._started().tokenizer is not None

    @property
    def address(self) -> str:
        """Where further frontends can `connect`."""
        return self._client.address

    def _started(self) -> InputProcessor:
        self._client.check_process()
        if self._processor is None:
            self._client.check()
            raise EngineError("the engine is not attached yet: `await engine.start()` first")
        return self._processor

    async def tokenize(self, prompt: PromptType) -> list[int]:
        """The prompt as the model would see it, checked as `generate` checks it."""
        await self.start()
        processor, parsed = self._started(), parse_prompt(prompt)
        return await self._run_in_thread(lambda: processor.token_ids(parsed)[0])

    async def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            EngineError: the engine has none (skip_tokenizer_init, or simulated).
        """
        await self.start()
        tokenizer = self._started().tokenizer
        if tokenizer is None:
            raise EngineError("this engine has no tokenizer: it takes and gives token ids")
        return tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (its generation_config), where it has any."""
        return SamplingParams.from_optional(**self.model_info.default_sampling)

    async def get_metrics(self) -> list[Metric]:
        """Every figure of the engine and of all its frontends, as of now."""
        await self.start()
        return await self._observer.metrics()

    async def get_telemetry(self, steps_after: int | None = None) -> tuple[Stats, Metrics]:
        """As `get_metrics`, as the core tells it; with the steps after this one, where it is not None."""
        await self.start()
        return await self._observer.telemetry(steps_after)

    @property
    def observer(self) -> Observer:
        """Counts, records and traces what this frontend does."""
        return self._observer

    async def do_log_stats(self) -> None:
        """Log one line with the engine's state; throughputs are since the last one."""
        await self.start()
        await self._observer.log_stats()

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300) -> None:
        """Return once nothing runs or waits, of whichever frontend. Raises TimeoutError after so many seconds."""
        await self.start()
        await wait_until_idle(self._observer.stats, self.get_num_unfinished_requests, drain_timeout)

    # ---- calls

    async def reset_prefix_cache(self) -> bool:
        """Forget every cached block that no running request holds; True if that were all of them."""
        await self.start()
        return (await self._client.call(ResetPrefixCache())).value

    async def pause_generation(
        self, *, mode: Literal["abort", "wait", "keep"] = "abort", clear_cache: bool = True
    ) -> None:
        """Stop generating, for every frontend; returns once nothing is being computed. New requests wait.

        Args:
            mode: what becomes of requests in flight: 'abort' ends them, 'wait' lets them finish first,
                'keep' freezes them until `resume_generation`.
            clear_cache: forget cached prefixes; requests kept are then computed anew.
        """
        if mode not in _PAUSE_MODES:
            raise ValidationError("mode", f"must be one of {', '.join(_PAUSE_MODES)}; got {mode!r}")
        await self.start()
        await self._client.call(PauseGeneration(mode=_PAUSE_MODES[mode], clear_cache=clear_cache))
        self._paused = True

    async def resume_generation(self) -> None:
        """Go on after `pause_generation`."""
        await self.start()
        await self._client.call(ResumeGeneration())
        self._paused = False

    async def is_paused(self) -> bool:
        """Whether this frontend has paused the engine."""
        self._client.check_process()
        return self._paused

    async def start_profile(self, prefix: str | None = None) -> None:
        """Trace the worker's steps from now on, into a file in TERCET_TORCH_PROFILER_DIR.

        Args:
            prefix: of the file's name.

        Raises:
            EngineError: the engine was started without that variable, or a profile is being made already.
        """
        await self.start()
        await self._client.call(StartProfile(prefix=check_profile_prefix("" if prefix is None else prefix)))

    async def stop_profile(self) -> None:
        """End the trace; returns once its file is written. Raises EngineError if none is being made."""
        await self.start()
        await self._client.call(StopProfile())
