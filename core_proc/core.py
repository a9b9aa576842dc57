"""The core process's loop: messages in, plans out to the worker, outputs out to the frontends.

All decisions are the scheduler's; this module moves bytes between it and the sockets.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from typing import assert_never

import msgspec
import numpy as np

from tercet.config import EngineConfig
from tercet.core_proc.checks import Refused, check_request
from tercet.core_proc.frontends import Frontend, Frontends
from tercet.core_proc.metrics import CoreMetrics
from tercet.core_proc.outbox import Outbox
from tercet.core_proc.results import apply_result, end_outputs
from tercet.core_proc.scheduler import Scheduler
from tercet.core_proc.totals import SeriesError
from tercet.gc_pauses import GcPauses
from tercet.ipc.channel import RouterEnd, Waiter
from tercet.ipc.errors import PeerGoneError, PeerUnreachableError, WireError
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Call,
    CheckInvariants,
    Finish,
    FrontendToCore,
    GetMetrics,
    GetStats,
    Goodbye,
    Heartbeat,
    Hello,
    Limits,
    ModelInfo,
    PauseGeneration,
    PauseMode,
    Reply,
    RequestFailed,
    ResetPrefixCache,
    ResumeGeneration,
    Shutdown,
    StartProfile,
    Stats,
    StepPlan,
    StepResult,
    StopProfile,
    Welcome,
    WorkerFailed,
    WorkerToCore,
)
from tercet.ipc.telemetry import FrontendReport, Metrics, Spans
from tercet.log import RepeatedWarning, get_logger
from tercet.version import __version__

logger = get_logger(__name__)

_HEARTBEAT_S = 1.0
_MALFORMED_LOG_S = 5.0
# For messages of frontends in one turn, so that neither a flood nor a burst keeps the worker waiting: a step of the
# first arrivals runs while the others are taken in.
_ARRIVALS_S = 0.0005


class WorkerDiedError(Exception):
    """The worker said that it cannot go on."""


class Core:
    """Steps one engine until told to stop."""

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        worker: bytes,
        workers: RouterEnd[WorkerToCore],
        frontends: RouterEnd[FrontendToCore],
        stop_fd: int,
        pauses: GcPauses | None = None,
    ) -> None:
        """
        Args:
            worker: identity of the worker's socket.
            workers: the end that the worker is connected to, past its Hello.
            frontends: the bound end for frontends.
            stop_fd: becomes readable when the core shall leave.
            pauses: for garbage collection, in this process.
        """
        self.config = config
        self.scheduler = scheduler
        self.frontends = Frontends()
        self.metrics = CoreMetrics(scheduler, pauses or GcPauses())
        self.stopping = False
        self._worker, self._workers, self._front_end = worker, workers, frontends
        self._outbox = Outbox(frontends)
        self._stop_fd = stop_fd
        self._files = {name: _read_file(path) for name, path in config.frontend.files.items()}
        self._limits = _limits(config, scheduler)
        self._model = _model_info(config)
        self._waiting_pauses: list[tuple[Frontend, Call]] = []
        self._worker_calls: dict[int, tuple[Frontend, Call]] = {}  # passed on, by the id that they have there
        self._next_worker_call = 1
        self._results: deque[StepResult] = deque()
        self._num_dropped = 0
        self._last_heartbeat = 0.0
        self._waiter = Waiter()
        for source in (workers, frontends, stop_fd):
            self._waiter.add(source)
        frontends.on_malformed = self._on_malformed
        self._malformed_log = RepeatedWarning(logger, _MALFORMED_LOG_S)

    # ---------------------------------------------------------------------------------- the two loops

    def run(self) -> None:
        """Step until told to stop."""
        if self.config.scheduler.async_scheduling:
            self.run_overlapped()
        else:
            self.run_plain()

    def run_plain(self) -> None:
        """One step at a time: the reference that the overlapped loop must equal."""
        while not self.stopping:
            if not self._plan_step():
                self._handle_messages(wait=True)
                continue
            while not self._results and not self.stopping:
                self._handle_messages(wait=True)
            while self._results:
                started_s, result = time.perf_counter(), self._results.popleft()
                self._send_outputs(self._apply(result))
                self.metrics.ended(result, time.perf_counter() - started_s)

    def run_overlapped(self) -> None:
        """Two steps in flight: the result of one is applied while the next one runs."""
        while not self.stopping:
            self.turn_overlapped()

    def turn_overlapped(self) -> None:
        """One turn of the overlapped loop: a result in, a plan and the outputs out, then what has arrived."""
        result = self._results.popleft() if self._results else None
        started_s = time.perf_counter()
        outputs = self._apply(result) if result is not None else []
        output_s = time.perf_counter() - started_s
        while self.scheduler.num_in_flight < 2 and self._plan_step():
            pass
        if result is not None:
            started_s = time.perf_counter()
            self._send_outputs(outputs)  # after the plan: the worker must never wait for us
            self.metrics.ended(result, output_s + time.perf_counter() - started_s)
        self._handle_messages(wait=not self._results)

    def _plan_step(self) -> bool:
        """Plan a step and send it; False where there is nothing to compute."""
        started_s = time.perf_counter()
        plan = self.scheduler.schedule(time.monotonic())
        if plan is None:
            return False
        self._send_plan(plan)
        self.metrics.planned(time.perf_counter() - started_s)
        return True

    def _send_plan(self, plan: StepPlan | Call) -> None:
        try:
            self._workers.send(self._worker, plan)
        except PeerUnreachableError as error:
            raise WorkerDiedError(f"worker: {error}") from None

    def _apply(self, result: StepResult) -> list[tuple[int, msgspec.Struct]]:
        outgoing = apply_result(self.scheduler, result, time.monotonic())
        return [*outgoing.failures, *outgoing.outputs]

    def _send_outputs(self, outputs: list[tuple[int, msgspec.Struct]]) -> None:
        if self.metrics.spans:  # first: who has read a request's end may leave
            spans, self.metrics.spans = self.metrics.spans, []
            outputs = [*spans, *outputs]
        for slot, message in outputs:
            if (frontend := self.frontends.by_slot.get(slot)) is not None:
                self._send(frontend, message)

    # ---------------------------------------------------------------------------------- messages in

    def _handle_messages(self, wait: bool) -> None:
        """Handle all that has arrived; with `wait`, block until something does or a heartbeat is due."""
        if self._waiting_pauses:  # the result applied last may have been what they waited for
            self._answer_pauses()
        for fd in self._waiter.wait(self._wait_s() if wait else 0.0):
            if fd == self._stop_fd:
                self.stopping = True
            elif (frontend := self.frontends.by_pidfd.get(fd)) is not None:
                logger.info("frontend %s (slot %d) is gone", frontend.name, frontend.slot)
                self._detach(frontend)
        while (received := self._workers.recv_nowait()) is not None:
            self._on_worker(*received)
        deadline = time.perf_counter() + _ARRIVALS_S
        while (arrived := self._front_end.recv_nowait()) is not None:
            self._on_frontend(*arrived)
            if time.perf_counter() > deadline:
                break
        if self._waiting_pauses:
            self._answer_pauses()
        if self._outbox.has_backlog:
            self._tend_backlogs()
        if self.metrics.spans:
            self._send_outputs([])
        self._send_heartbeats()

    def _wait_s(self) -> float:
        if self._outbox.has_backlog:
            return self._outbox.wait_s
        return _HEARTBEAT_S if self.frontends.by_peer or self._malformed_log.pending else 3600.0

    def _on_worker(self, peer: bytes, message: WorkerToCore) -> None:
        match message:
            case StepResult(epoch=epoch) if epoch == self.scheduler.epoch:
                self._results.append(message)
            case Reply(call_id=call_id, error=error) if call_id in self._worker_calls:
                frontend, call = self._worker_calls.pop(call_id)
                if self.frontends.by_slot.get(frontend.slot) is frontend:
                    self._reply(frontend, call, error=error)
            case Spans(frontend=slot):
                self._send_outputs([(slot, message)])
            case WorkerFailed(message=problem):
                raise WorkerDiedError(problem)
            case Heartbeat():
                pass
            case _:
                self._num_dropped += 1

    def _on_frontend(self, peer: bytes, message: FrontendToCore) -> None:
        frontend = self.frontends.by_peer.get(peer)
        if isinstance(message, Hello):
            self._on_hello(peer, message)
            return
        if frontend is None and isinstance(message, Goodbye):
            return  # detached before
        if frontend is None or message.epoch != self.scheduler.epoch:
            self._num_dropped += 1
            if frontend is None:
                reason = "not attached: say Hello first; a frontend that does not read is detached"
                self._try_send(peer, Goodbye(epoch=self.scheduler.epoch, reason=reason))
            return
        match message:
            case AddRequest():
                self._on_add(frontend, message)
            case Abort():
                self._on_abort(frontend, message)
            case Call():
                self._on_call(frontend, message)
            case FrontendReport():
                self._on_report(frontend, message)
            case Heartbeat():
                pass
            case Goodbye():
                self._detach(frontend)
            case _:
                assert_never(message)

    def _on_hello(self, peer: bytes, hello: Hello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            reason = f"this core speaks protocol {PROTOCOL_VERSION}, not {hello.protocol_version}"
            self._try_send(peer, Goodbye(epoch=self.scheduler.epoch, reason=reason))
            return
        if peer not in self.frontends.by_peer:
            frontend = self.frontends.attach(peer, hello)
            if frontend.pidfd >= 0:
                self._waiter.add(frontend.pidfd)
            logger.info("frontend %s (pid %d) attached as slot %d", hello.name, hello.pid, frontend.slot)
        welcome = Welcome(
            epoch=self.scheduler.epoch,
            protocol_version=PROTOCOL_VERSION,
            version=__version__,
            pid=os.getpid(),
            model=self._model,
            limits=self._limits,
            files=self._files,
            heartbeat_s=_HEARTBEAT_S,
        )
        self._send(self.frontends.by_peer[peer], welcome)

    def _on_add(self, frontend: Frontend, message: AddRequest) -> None:
        try:
            check_request(message, self._model, self._limits)
            handles = range(message.handle, message.handle + len(message.seeds))
            if any((frontend.slot, handle) in self.scheduler.requests for handle in handles):
                raise Refused("invalid", "handle: names an unfinished request")
            if frontend.is_overrun:
                raise Refused(
                    "queue_full", "this frontend does not read what it asked for; read, then try again"
                )
            if len(self.scheduler.waiting) + len(handles) > self._limits.max_waiting:
                raise Refused("queue_full", f"the queue is full ({self._limits.max_waiting} requests wait)")
        except Refused as refused:
            self.metrics.refused(refused.code)
            failure = RequestFailed(
                epoch=self.scheduler.epoch, handle=message.handle, code=refused.code, message=str(refused)
            )
            self._send(frontend, failure)
            return
        self.scheduler.add(frontend.slot, message, time.monotonic())

    def _on_abort(self, frontend: Frontend, message: Abort) -> None:
        handles = message.handles
        if handles.ndim != 1 or handles.dtype != np.uint64:
            self._on_malformed(frontend.peer, WireError("handles: must be a vector of u64"))
            return
        self.scheduler.abort(frontend.slot, handles.tolist(), stopped=message.reason is Finish.EOS)

    def _on_malformed(self, peer: bytes, error: WireError) -> None:
        """Tell a peer that what it sent is no message; nothing else notices."""
        self._malformed_log.warn(time.monotonic(), "malformed message from a frontend: %s", error)
        self._try_send(peer, Goodbye(epoch=self.scheduler.epoch, reason=f"malformed message: {error}"))
        if (frontend := self.frontends.by_peer.get(peer)) is not None:
            self._detach(frontend)

    def _on_report(self, frontend: Frontend, message: FrontendReport) -> None:
        try:
            self.metrics.reported(frontend, message)
        except SeriesError as error:
            self._num_dropped += 1
            self._malformed_log.warn(time.monotonic(), "report of a frontend: %s", error)

    # ---------------------------------------------------------------------------------- calls

    def _on_call(self, frontend: Frontend, call: Call) -> None:
        match call.body:
            case ResetPrefixCache():
                self._reply(frontend, call, value=self.scheduler.reset_prefix_cache())
            case PauseGeneration(mode=mode):
                self._pause(mode)
                self._waiting_pauses.append((frontend, call))
            case ResumeGeneration():
                self.scheduler.paused = None
                pauses, self._waiting_pauses = self._waiting_pauses, []
                for owner, pause in pauses:
                    self._reply(owner, pause, error="resumed before everything had come to rest")
                self._reply(frontend, call)
            case GetStats():
                self._reply(frontend, call, stats=self.stats())
            case GetMetrics(steps_after=after):
                frontends = self.frontends.by_peer.values()
                metrics = self.metrics.metrics(frontends, len(self._results), after)
                self._reply(frontend, call, stats=self.stats(), metrics=metrics)
            case CheckInvariants():
                self._reply(frontend, call, error=_failure(self.scheduler.check_invariants))
            case StartProfile() | StopProfile():
                self._pass_on(frontend, call)
            case _:
                assert_never(call.body)

    def _pass_on(self, frontend: Frontend, call: Call) -> None:
        """Ask the worker, between two plans; its Reply becomes ours."""
        call_id = self._next_worker_call
        self._next_worker_call += 1
        self._worker_calls[call_id] = (frontend, call)
        self._send_plan(Call(epoch=self.scheduler.epoch, call_id=call_id, body=call.body))

    def _pause(self, mode: PauseMode) -> None:
        self.scheduler.paused = mode
        if mode is PauseMode.ABORT:
            self.abort_all()

    def _answer_pauses(self) -> None:
        """Reply to pauses that have come to rest."""
        scheduler = self.scheduler
        if not scheduler.at_rest:
            return
        for frontend, call in self._waiting_pauses:
            if isinstance(call.body, PauseGeneration) and call.body.clear_cache:
                scheduler.preempt_all()
                scheduler.reset_prefix_cache()
            self._reply(frontend, call)
        self._waiting_pauses.clear()

    def abort_all(self) -> None:
        """End every request, telling its frontend."""
        requests = list(self.scheduler.requests.values())
        outputs = end_outputs(self.scheduler, requests, Finish.ABORT)
        for request in requests:
            self.scheduler.end(request, Finish.ABORT)
        self.scheduler.counters.num_aborted += len(requests)
        self._send_outputs([*outputs])

    def _reply(
        self,
        frontend: Frontend,
        call: Call,
        *,
        value: bool = True,
        stats: Stats | None = None,
        metrics: Metrics | None = None,
        error: str | None = None,
    ) -> None:
        reply = Reply(
            epoch=self.scheduler.epoch,
            call_id=call.call_id,
            value=value,
            stats=stats,
            metrics=metrics,
            error=error,
        )
        self._send(frontend, reply)

    def stats(self) -> Stats:
        """Gauges and counters now."""
        scheduler, counters = self.scheduler, self.scheduler.counters
        return Stats(
            epoch=scheduler.epoch,
            time_s=time.time(),
            step=scheduler.step,
            num_running=scheduler.rows.num_running,
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.usage,
            num_free_blocks=scheduler.pool.num_free,
            num_frontends=len(self.frontends),
            dropped_messages=self._num_dropped + self._front_end.dropped + self._workers.dropped,
            num_refused=self.metrics.num_refused,
            **{name: getattr(counters, name) for name in counters.__slots__},
        )

    # ---------------------------------------------------------------------------------- messages out

    def _send(self, frontend: Frontend, message: msgspec.Struct) -> None:
        """Send, or keep for later where the frontend does not read; one that has left is detached."""
        try:
            self._outbox.send(frontend, message)
        except PeerGoneError:
            self._detach(frontend)

    def _try_send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Send a last word to whoever may not read it: nothing waits for it, and nothing counts it."""
        try:
            self._front_end.send(peer, message)
        except PeerUnreachableError:
            pass

    def _tend_backlogs(self) -> None:
        """Send what can be sent again; end the requests of a frontend that leaves too much unread."""
        for frontend, hopeless in self._outbox.overrun():
            if hopeless:
                logger.warning("frontend %s asks and does not read: detached", frontend.name)
                self._detach(frontend)
            else:
                self._abandon(frontend)
        for frontend in self._outbox.retry():
            self._detach(frontend)

    def _abandon(self, frontend: Frontend) -> None:
        """End the requests of a frontend; it reads why once it reads again, after what came before."""
        problem = "aborted: this frontend left more of its outputs unread than the engine keeps"
        requests = [r for r in self.scheduler.requests.values() if r.frontend == frontend.slot]
        logger.warning("frontend %s does not read: its %d requests are aborted", frontend.name, len(requests))
        for request in reversed(requests):  # last first, so that the waiting queue is emptied from its end
            self.scheduler.end(request, Finish.ABORT)
            failure = RequestFailed(
                epoch=self.scheduler.epoch, handle=request.handle, code="unread", message=problem
            )
            self._send(frontend, failure)
        self.scheduler.counters.num_aborted += len(requests)

    def _send_heartbeats(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat >= _HEARTBEAT_S:
            self._last_heartbeat = now
            self._malformed_log.flush(now)
            for frontend in list(self.frontends.by_peer.values()):
                if frontend.backlog is None:  # for one that does not read, they would only pile up
                    self._send(frontend, self.stats())

    def _detach(self, frontend: Frontend) -> None:
        """Forget a frontend: its requests are aborted, their blocks free from the next plan on."""
        if frontend.pidfd >= 0:
            self._waiter.remove(frontend.pidfd)
        self._outbox.forget(frontend)
        self.frontends.detach(frontend)
        count = self.scheduler.abort_frontend(frontend.slot)
        self._waiting_pauses = [(f, call) for f, call in self._waiting_pauses if f is not frontend]
        logger.info(
            "frontend %s (slot %d) detached, %d requests aborted", frontend.name, frontend.slot, count
        )

    def close(self, reason: str, *, fault: bool) -> None:
        """Tell everyone that this core leaves; in good order, end what runs first.

        After a fault nothing is ended: to its frontend a request must look unfinished, as it is.
        """
        if not fault:
            self.abort_all()
        self._outbox.retry(at_once=True)
        for frontend in list(self.frontends.by_peer.values()):
            self._try_send(frontend.peer, Goodbye(epoch=self.scheduler.epoch, reason=reason))
        try:
            self._workers.send(self._worker, Shutdown(epoch=self.scheduler.epoch))
        except PeerUnreachableError:
            pass


def _limits(config: EngineConfig, scheduler: Scheduler) -> Limits:
    return Limits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_waiting=config.scheduler.max_num_queued_reqs,
        max_logprobs=config.scheduler.max_logprobs,
        max_children=config.scheduler.max_children,
        block_size=config.cache.block_size,
        num_blocks=scheduler.pool.num_blocks,
    )


def _model_info(config: EngineConfig) -> ModelInfo:
    model = config.model
    return ModelInfo(
        name=model.model,
        served_names=model.served_model_name,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        architecture=model.architecture,
        eos_token_ids=model.eos_token_ids,
        default_sampling=model.default_sampling,
        fingerprint=model.fingerprint,
    )


def _read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _failure(check: Callable[[], None]) -> str | None:
    try:
        check()
    except AssertionError as error:
        return str(error) or "accounts do not agree"
    return None
