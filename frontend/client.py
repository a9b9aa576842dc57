"""A frontend's connection to one core: handshake, epochs, heartbeats, calls, and the end of all that.

Lives on one asyncio event loop. Knows messages and who waits for them; what outputs mean is the output
processor's. However the engine ends, everyone who waits here is told.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from tercet.errors import (
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    EngineError,
    QueueFullError,
    RequestError,
    TercetError,
    ValidationError,
)
from tercet.frontend.output_processor import OutputProcessor
from tercet.frontend.pulse import Pulse
from tercet.frontend.reporting import Reporter
from tercet.ipc.address import check_address, is_socket
from tercet.ipc.channel import AsyncDealerEnd
from tercet.ipc.errors import ClosedChannelError, PeerUnreachableError
from tercet.ipc.host import host_id
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Call,
    CallBody,
    CoreToFrontend,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    Reply,
    RequestFailed,
    Stats,
    StepOutputs,
    Welcome,
)
from tercet.ipc.telemetry import Spans
from tercet.log import get_logger

logger = get_logger(__name__)

SILENT_HEARTBEATS: Final = 30
"""After so many intervals without any message the core counts as dead, though its process may live."""

MAX_UNSENT: Final = 65536  # aborts kept while the core does not read


def forked_error() -> EngineClosedError:
    """What a forked child gets from an engine object of its parent.

    Threads, the event loop and the processes stayed with the parent; descriptors are shared with it.
    """
    return EngineClosedError("made in another process; connect anew with AsyncLLM.connect(address)")


class CoreClient:
    """The connection. `connect` first; afterwards `dead_error` says whether it still holds.

    It is closed to forked children: there `dead_error` says so, and nothing touches the parent's socket.

    Attributes:
        outputs: this frontend's requests.
        welcome: what the core said of itself; None before.
        reporter: counts what the core shall be told of this frontend.
        on_spans: told what core and worker have measured of traced requests.
        on_stats: told the gauges and counters that the core sends by itself, once a heartbeat interval.
        pulse: what those, and the time since the last message, say of the engine's health.
        num_dropped: messages of another epoch, or out of place.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.outputs = OutputProcessor(self._send_abort)
        self.reporter = Reporter(self.outputs)
        self.welcome: Welcome | None = None
        self.on_stats: Callable[[Stats], None] | None = None
        self.on_spans: Callable[[Spans], None] | None = None
        self.pulse = Pulse()
        self.num_dropped = 0
        self._pid = os.getpid()
        self._dead_error: EngineError | None = None
        self._end: AsyncDealerEnd[CoreToFrontend] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._epoch = -1
        self._welcomed: asyncio.Future[Welcome] | None = None
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._next_call_id = 1
        self._unsent: deque[Abort] = deque()
        self._num_silent = 0
        self._sent_lately = False
        self._timer: asyncio.TimerHandle | None = None
        self._core_pidfd = -1

    # ---- the connection's life

    @property
    def is_forked(self) -> bool:
        """Whether this is a child process that inherited the connection."""
        return os.getpid() != self._pid

    @property
    def dead_error(self) -> EngineError | None:
        """Why nothing more can be asked of the engine; None while it can."""
        return forked_error() if self.is_forked else self._dead_error

    async def connect(self, name: str, timeout_s: float, watch_process: bool) -> Welcome:
        """Attach to the core.

        Args:
            name: of this frontend, for the core's log.
            timeout_s: for its answer.
            watch_process: notice the end of the core's process at once. For an engine started elsewhere; one
                that this process started has a supervisor, which knows more.

        Raises:
            ConfigError: it is no address, or no engine listens there.
            EngineError: it does not answer, or speaks another protocol.
        """
        self.check_process()
        if not is_socket(check_address(self.address)):
            problem = f"no engine listens at {self.address}; start one with `tercet engine --address`"
            raise ConfigError("address", problem)
        self._loop = asyncio.get_running_loop()
        self._welcomed = self._loop.create_future()
        self._end = AsyncDealerEnd(self.address, CoreToFrontend)
        try:
            self._end.start(self._on_message)
            self._end.send(
                Hello(protocol_version=PROTOCOL_VERSION, name=name, pid=os.getpid(), host=host_id())
            )
            async with asyncio.timeout(timeout_s):
                welcome = await self._welcomed
        except BaseException as error:
            failure = EngineDeadError(f"the engine at {self.address} gave no answer within {timeout_s:g} s")
            self._end_with(failure if isinstance(error, TimeoutError) else EngineClosedError("not connected"))
            if isinstance(error, TimeoutError):
                raise failure from None
            raise
        self._timer = self._loop.call_later(welcome.heartbeat_s, self._tick)
        if watch_process:
            self._watch_process(welcome.pid)
        return welcome

    def close(self) -> None:
        """Leave: the core aborts what is unfinished here, and everyone who waits is told. Idempotent."""
        if self.dead_error is None:
            if self._end is not None and self._epoch >= 0:
                self.report()  # or what was counted last would be lost
                self._try_send(Goodbye(epoch=self._epoch, reason="closed"))
            self._end_with(EngineClosedError("the engine was shut down on this side"))

    def die(self, reason: str) -> None:
        """The engine has died: everyone who waits gets EngineDeadError. Idempotent."""
        if self.dead_error is None:
            logger.error("engine at %s has died: %s", self.address, reason)
            self._end_with(EngineDeadError(f"the engine has died: {reason}"))

    def _end_with(self, error: EngineError) -> None:
        self._dead_error = error
        if self._timer is not None:
            self._timer.cancel()
        self._unwatch_process()
        if self._end is not None:
            self._end.close()
        if self._loop is not None and self._loop.is_closed():
            return  # nobody can be waiting, and futures of that loop cannot be resolved
        for future in (self._welcomed, *self._calls.values()):
            if future is not None and not future.done():
                future.set_exception(error)
        self._calls.clear()
        self.outputs.fail_all(error)

    # ---- messages out

    def check(self) -> None:
        """Raises EngineDeadError or EngineClosedError if the engine is gone."""
        if (error := self.dead_error) is not None:
            # Anew, lest every raise lengthen the traceback of one shared object.
            raise type(error)(*error.args)

    def check_process(self) -> None:
        """Raises EngineClosedError in a forked child."""
        if self.is_forked:
            raise forked_error()

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that this connection lives on, once it has one."""
        return self._loop

    def add(self, message: AddRequest) -> None:
        """Send a request.

        Raises:
            QueueFullError: the core does not read what it was sent.
            EngineDeadError, EngineClosedError: there is no engine any more.
        """
        self.check()
        if not self._try_send(message):
            self.check()
            raise QueueFullError("the engine does not take requests quickly enough; try again later")

    async def call(self, body: CallBody) -> Reply:
        """Ask the core to do something between two steps, and wait until it is done.

        Raises:
            EngineError: the core could not do it.
            EngineDeadError, EngineClosedError: there is no engine any more.
        """
        self.check()
        assert self._loop is not None
        call_id = self._next_call_id
        self._next_call_id += 1
        future: asyncio.Future[Reply] = self._loop.create_future()
        if not self._try_send(Call(epoch=self._epoch, call_id=call_id, body=body)):
            self.check()
            raise EngineError("the engine does not read its messages; try again later")
        self._calls[call_id] = future
        try:
            reply = await future
        finally:
            self._calls.pop(call_id, None)
        if reply.error is not None:
            raise EngineError(reply.error)
        return reply

    def _send_abort(self, handles: list[int], reason: Finish) -> None:
        if self.dead_error is None and self._epoch >= 0 and handles:
            message = Abort(epoch=self._epoch, handles=np.array(handles, np.uint64), reason=reason)
            if self._unsent or not self._try_send(message):
                self._unsent.append(message)
                if len(self._unsent) > MAX_UNSENT:
                    self.die("it does not read its messages")

    def _try_send(self, message: msgspec.Struct) -> bool:
        if self._end is None or self._end.closed:
            return False
        try:
            self._end.send(message)
        except (PeerUnreachableError, ClosedChannelError):
            return False
        self._sent_lately = True
        return True

    def _tick(self) -> None:
        """Once per heartbeat interval. A busy event loop delays ticks too, so it cannot fake silence."""
        assert self._loop is not None and self.welcome is not None
        self._num_silent += 1
        self.pulse.silent_s = (self._num_silent - 1) * self.welcome.heartbeat_s
        if self._num_silent > SILENT_HEARTBEATS:
            self.die(f"no sign of life for {self._num_silent * self.welcome.heartbeat_s:.0f} s")
            return
        while self._unsent and self._try_send(self._unsent[0]):
            self._unsent.popleft()
        self.report()
        if not self._sent_lately:
            self._try_send(Heartbeat(epoch=self._epoch))
        self._sent_lately = False
        self._timer = self._loop.call_later(self.welcome.heartbeat_s, self._tick)

    def report(self) -> None:
        """Tell the core what was counted here since the last time; by itself once a heartbeat interval."""
        message = self.reporter.take(self._epoch)
        if message is not None:
            self._try_send(message)

    # ---- messages in

    def _on_message(self, message: CoreToFrontend) -> None:
        self._num_silent = 0
        if message.epoch != self._epoch:
            self._on_other_epoch(message)
            return
        match message:
            case StepOutputs():
                self.outputs.apply(message)
            case RequestFailed(handle=handle):
                self.outputs.fail_handle(handle, lambda request_id: _failure(message, request_id))
            case Reply(call_id=call_id):
                future = self._calls.get(call_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case Stats():
                self.pulse.observe(message)
                if self.on_stats is not None:
                    self.on_stats(message)
            case Spans():
                if self.on_spans is not None:
                    self.on_spans(message)
            case Heartbeat():
                pass
            case Goodbye(reason=reason):
                self.die(reason or "it said goodbye")
            case Welcome():
                self.num_dropped += 1

    def _on_other_epoch(self, message: CoreToFrontend) -> None:
        """Only the handshake's answer may bring a new epoch; all else is of another life of the core."""
        waiting = self._welcomed is not None and not self._welcomed.done()
        if not waiting or not isinstance(message, (Welcome, Goodbye)):
            self.num_dropped += 1
            return
        assert self._welcomed is not None
        if isinstance(message, Goodbye):
            self._welcomed.set_exception(EngineError(f"the engine refused this frontend: {message.reason}"))
        elif message.protocol_version != PROTOCOL_VERSION:
            theirs = f"it speaks protocol {message.protocol_version} (Tercet {message.version})"
            problem = f"{theirs}, this frontend {PROTOCOL_VERSION}: install the same version"
            self._welcomed.set_exception(EngineError(problem))
        else:
            self._epoch, self.welcome = message.epoch, message
            self._welcomed.set_result(message)

    # ---- the core's process

    def _watch_process(self, pid: int) -> None:
        assert self._loop is not None
        try:
            self._core_pidfd = os.pidfd_open(pid)
        except OSError:  # in another pid namespace: its silence will tell
            return
        self._loop.add_reader(self._core_pidfd, self._on_process_end, pid)

    def _on_process_end(self, pid: int) -> None:
        self._unwatch_process()
        if self.dead_error is None:
            assert self._loop is not None
            # What it sent before its end, a Goodbye perhaps, may still lie in the socket.
            self._loop.call_later(0.05, self.die, f"its core process {pid} ended")

    def _unwatch_process(self) -> None:
        if self._core_pidfd >= 0:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._core_pidfd)
            os.close(self._core_pidfd)
            self._core_pidfd = -1


def _failure(message: RequestFailed, request_id: str) -> TercetError:
    """The error that a refused or failed request raises."""
    match message.code:
        case "queue_full":
            return QueueFullError(message.message)
        case "invalid" | "unsupported":
            field, colon, problem = message.message.partition(": ")
            return ValidationError(field, problem) if colon else ValidationError("request", message.message)
        case "shutdown":
            return EngineClosedError(message.message)
        case _:
            return RequestError(request_id, message.message)
