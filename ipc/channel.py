"""Typed ends of ZeroMQ sockets: the only module that names zmq.

A `RouterEnd` binds and talks to many peers by identity; a `DealerEnd` connects to one router and can be
used blocking; an `AsyncDealerEnd` is the same on an asyncio event loop, with one wake-up for all messages
that have arrived. All ends send and receive whole messages of one inbox union; bytes that are no such message
are counted in `dropped` and never reach the caller.

Ends belong to one thread. Queues are bounded on both sides (HWM, in messages): a router whose peer does not
read raises `PeerBusyError` instead of dropping silently (ROUTER_MANDATORY).
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar, cast

import msgspec
import zmq

from tercet.errors import ConfigError
from tercet.ipc.address import AddressClaim, check_address, socket_path
from tercet.ipc.codec import MAX_MESSAGE_BYTES, Buffer, Decoder, Encoder
from tercet.ipc.errors import ClosedChannelError, PeerBusyError, PeerGoneError, WireError

COPY_BYTES: Final = 256 * 1024
"""Frames below this are copied into the socket: cheaper than tracking their buffer's life.

Round trip of an array, copied or not (`benchmarks/bench_channel.py`, medians in µs on 2 cores): 64 KB 393 or 543,
128 KB 377 or 509, 256 KB 684 or 708, 1 MB 1258 or 1277 (at best 894 or 723).
"""

HIGH_WATER_MARK: Final = 4096  # messages per peer and direction
LINGER_MS: Final = 200  # how long a closing end tries to hand over what it still holds
_MAX_MALFORMED: Final = 256  # read in one call of a router's `recv_nowait`
_DRAIN_BATCH: Final = 64  # messages handled in one wake-up before other callbacks get their turn

In = TypeVar("In", bound=msgspec.Struct)


class _End(Generic[In]):
    """What all ends share: a context, a socket, an encoder and a decoder."""

    def __init__(self, kind: int, address: str, inbox: Any, send_queue: int = HIGH_WATER_MARK) -> None:
        self.address = check_address(address)
        self._context = zmq.Context(io_threads=1)
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, send_queue)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket = socket
        self._encoder = Encoder()
        self._decoder: Decoder[In] = Decoder(inbox)
        self.dropped = 0

    @property
    def closed(self) -> bool:
        return bool(self._socket.closed)

    def close(self) -> None:
        """Hand over what is still queued for at most LINGER_MS, then let go of the socket. Idempotent."""
        if not self._socket.closed:
            self._socket.close()
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _send_frames(self, prefix: bytes | None, message: msgspec.Struct) -> None:
        frames = self._encoder.encode(message)
        socket, flags = self._socket, zmq.DONTWAIT
        try:
            if prefix is not None:
                socket.send(prefix, flags | zmq.SNDMORE, copy=True)
            last = len(frames) - 1
            for index, frame in enumerate(frames):
                # Frame 0 is the encoder's own buffer, written again by the next message: always copied.
                copy = index == 0 or len(frame) < COPY_BYTES
                socket.send(frame, flags | zmq.SNDMORE if index < last else flags, copy=copy)
        except zmq.Again:
            raise PeerBusyError("the peer does not read: its queue is full") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerGoneError("the peer has left") from None
            if self._socket.closed or error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise ClosedChannelError("this end was closed") from None
            raise

    def _recv_frames(self) -> list[zmq.Frame] | None:
        try:
            return self._socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if self._socket.closed or error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                raise ClosedChannelError("this end was closed") from None
            raise

    def _decode(self, frames: list[zmq.Frame]) -> In:
        buffers: list[Buffer] = [frame.buffer for frame in frames]
        return self._decoder.decode(buffers)


class RouterEnd(_End[In]):
    """The binding end: many peers, each known by the identity of its socket."""

    def __init__(
        self,
        address: str,
        inbox: Any,
        *,
        send_queue: int = HIGH_WATER_MARK,
        claim: AddressClaim | None = None,
    ) -> None:
        """Bind.

        Args:
            address: ipc:///path; its directory must be the caller's own, for only its mode guards the path.
            inbox: union of the messages that peers may send.
            send_queue: messages kept for each peer that does not read, before `send` says so.
            claim: on the address, if the caller has one already; it is this end's from now on.

        Raises:
            ConfigError: the address is not one that Tercet opens, or is in use.
        """
        self._claim = claim or AddressClaim(address)
        super().__init__(zmq.ROUTER, address, inbox, send_queue)
        self.on_malformed: Callable[[bytes, WireError], None] | None = None
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError("address", f"cannot bind {address}: {error}") from None
        socket_path(address).chmod(0o600)

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Queue a message for a peer, without waiting.

        Raises:
            PeerGoneError: it has left.
            PeerBusyError: it does not read.
        """
        self._send_frames(peer, message)

    def recv_nowait(self) -> tuple[bytes, In] | None:
        """The next message and who sent it, or None where there is none now.

        None too after many malformed ones in a row, so that who floods this end with them does not hold the caller;
        a `Waiter` then wakes at once.
        """
        for _ in range(_MAX_MALFORMED):
            if not (frames := self._recv_frames()):
                break
            peer = bytes(frames[0].buffer)
            try:
                return peer, self._decode(frames[1:])
            except WireError as error:
                self.dropped += 1
                if self.on_malformed is not None:
                    self.on_malformed(peer, error)
        return None

    def close(self) -> None:
        """Close, and remove the socket file. Idempotent."""
        if not self.closed:
            super().close()
            self._claim.release()


class DealerEnd(_End[In]):
    """The connecting end, for code that may block."""

    def __init__(self, address: str, inbox: Any, identity: bytes | None = None) -> None:
        """Connect; the peer need not be there yet.

        Args:
            identity: how the router knows this end; random where None. Must be unique among its peers.
        """
        super().__init__(zmq.DEALER, address, inbox)
        self._socket.setsockopt(zmq.IDENTITY, identity or secrets.token_bytes(8).replace(b"\0", b"\1"))
        self._socket.connect(address)

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message, without waiting.

        Raises:
            PeerBusyError: the router does not read and the queue is full.
        """
        self._send_frames(None, message)

    def recv_nowait(self) -> In | None:
        """The next message, or None where there is none now."""
        while frames := self._recv_frames():
            try:
                return self._decode(frames)
            except WireError:
                self.dropped += 1
        return None

    def recv(self, timeout_s: float | None = None) -> In | None:
        """The next message, or None after `timeout_s` (None waits for ever)."""
        while (message := self.recv_nowait()) is None:
            if not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
                return None
        return message


class AsyncDealerEnd(DealerEnd[In]):
    """A connecting end on an asyncio loop: messages are handed to a callback, many per wake-up.

    A forked child that goes on with its parent's loop has the parent's socket too, and leaves it alone.

    zmq's descriptor is edge-triggered: it becomes readable once and says nothing more until the socket's
    state was read. So every wake-up drains the socket, and every send looks whether something came meanwhile.
    """

    def __init__(self, address: str, inbox: Any, identity: bytes | None = None) -> None:
        super().__init__(address, inbox, identity)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handler: Callable[[In], None] | None = None
        self._scheduled = False
        self._pid = os.getpid()

    def start(self, handler: Callable[[In], None]) -> None:
        """From now on call `handler` on the running loop with each message, in order."""
        self._loop, self._handler = asyncio.get_running_loop(), handler
        self._loop.add_reader(self._descriptor(), self._drain)
        self._schedule()

    def send(self, message: msgspec.Struct) -> None:
        """As `DealerEnd.send`. Raises ClosedChannelError in a forked child."""
        if os.getpid() != self._pid:
            raise ClosedChannelError("this end belongs to the parent process")
        try:
            super().send(message)
        finally:  # a send that fails has read the socket's state too
            if self._loop is not None and not self._scheduled and self._readable():
                self._schedule()

    def close(self) -> None:
        if self._loop is not None and not self._socket.closed:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._descriptor())
            self._loop = None
        super().close()

    def _readable(self) -> bool:
        return bool(cast(int, self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _descriptor(self) -> int:
        return cast(int, self._socket.getsockopt(zmq.FD))

    def _schedule(self) -> None:
        if self._loop is not None:  # None once a handler has closed this end
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        if os.getpid() != self._pid:
            return  # what has come is the parent's to read
        self._scheduled = False
        handler = self._handler
        for _ in range(_DRAIN_BATCH):
            if self._loop is None or handler is None or (message := self.recv_nowait()) is None:
                return
            try:
                handler(message)
            except BaseException:
                self._schedule()  # the descriptor will not tell again of what is still to be read
                raise
        self._schedule()


class Waiter:
    """Waits for any of several ends or file descriptors of one thread to have something to read."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()

    def add(self, source: _End[Any] | int) -> None:
        self._poller.register(source if isinstance(source, int) else source._socket, zmq.POLLIN)

    def remove(self, source: _End[Any] | int) -> None:
        self._poller.unregister(source if isinstance(source, int) else source._socket)

    def wait(self, timeout_s: float | None) -> set[int]:
        """Block until something is readable or the time is over; returns the readable descriptors."""
        timeout_ms = None if timeout_s is None else max(0, int(timeout_s * 1000))
        events: Iterable[tuple[Any, int]] = self._poller.poll(timeout_ms)
        return {source for source, _ in events if isinstance(source, int)}
