"""Typed ends over real sockets: order, identities, bounds, malformed bytes, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
import zmq

from tercet.errors import ConfigError
from tercet.ipc.address import MAX_IPC_PATH, check_address, is_serving, is_socket, socket_path
from tercet.ipc.channel import (
    COPY_BYTES,
    HIGH_WATER_MARK,
    AsyncDealerEnd,
    DealerEnd,
    RouterEnd,
    Waiter,
)
from tercet.ipc.codec import INLINE_BYTES, Encoder
from tercet.ipc.errors import ClosedChannelError, PeerBusyError, PeerGoneError, WireError
from tercet.ipc.messages import (
    Abort,
    CoreToFrontend,
    FrontendToCore,
    Goodbye,
    Heartbeat,
    RequestFailed,
)

TIMEOUT_S = 10.0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("s")))
    yield f"ipc://{folder}/x"
    assert list(folder.iterdir()) == [], "a socket file was left"


@pytest.fixture
def router(address: str) -> Iterator[RouterEnd[Any]]:
    with RouterEnd[Any](address, FrontendToCore) as end:
        yield end


def beat(number: int) -> Heartbeat:
    return Heartbeat(epoch=number)


def receive(end: RouterEnd[Any], count: int, timeout_s: float = TIMEOUT_S) -> list[tuple[bytes, Any]]:
    found: list[tuple[bytes, Any]] = []
    deadline = time.monotonic() + timeout_s
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} messages came"
        if (item := end.recv_nowait()) is None:
            time.sleep(0.001)
        else:
            found.append(item)
    return found


def next_of(end: DealerEnd[Any]) -> Any:
    message = end.recv(TIMEOUT_S)
    assert message is not None, "nothing came"
    return message


def send_until_busy(send: Callable[[Any], None]) -> int:
    """Send numbered messages until the queues are full; returns how many were taken."""
    for number in range(20 * HIGH_WATER_MARK):
        try:
            send(Goodbye(epoch=number, reason="x" * 200))
        except PeerBusyError:
            return number
    raise AssertionError("the queues have no bound")


def wait_for(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# ------------------------------------------------------------------------------------ blocking ends


def test_messages_arrive_whole_and_in_order_both_ways(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        for number in range(1000):
            dealer.send(beat(number))
        received = receive(router, 1000)
        assert [message.epoch for _, message in received] == list(range(1000))
        peer = received[0][0]
        for number in range(1000):
            router.send(peer, beat(number))
        assert [next_of(dealer).epoch for _ in range(1000)] == list(range(1000))
        assert dealer.recv_nowait() is None


def test_each_peer_has_an_identity_and_gets_what_is_meant_for_it(
    router: RouterEnd[Any], address: str
) -> None:
    dealers = [DealerEnd[Any](address, CoreToFrontend) for _ in range(5)]
    dealers.append(DealerEnd[Any](address, CoreToFrontend, identity=b"by name"))
    for number, dealer in enumerate(dealers):
        dealer.send(beat(number))
    peers = {message.epoch: peer for peer, message in receive(router, 6)}
    assert len(set(peers.values())) == 6 and peers[5] == b"by name"
    for number, peer in peers.items():
        router.send(peer, beat(100 + number))
    for number, dealer in enumerate(dealers):
        assert next_of(dealer).epoch == 100 + number
        dealer.close()


@pytest.mark.parametrize(
    "num_bytes", [0, INLINE_BYTES, INLINE_BYTES + 8, COPY_BYTES, COPY_BYTES + 8, 1 << 23]
)
def test_arrays_of_any_size_cross_unharmed(router: RouterEnd[Any], address: str, num_bytes: int) -> None:
    handles = np.random.default_rng(num_bytes).integers(0, 2**63, num_bytes // 8).astype(np.uint64)
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        for epoch in range(3):
            dealer.send(Abort(epoch=epoch, handles=handles))
        received = receive(router, 3)
    for _, message in received:
        assert np.array_equal(message.handles, handles)


def test_a_received_array_is_a_view_of_the_received_frame(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(Abort(epoch=1, handles=np.arange(COPY_BYTES, dtype=np.uint64)))
        wait_for(lambda: bool(router._socket.poll(0)))
        frames = router._recv_frames()
        assert frames is not None and len(frames) == 3  # identity, head, buffer
        message = router._decode(frames[1:])
        assert np.shares_memory(message.handles, np.frombuffer(frames[2].buffer, np.uint8))
        assert message.handles[-1] == COPY_BYTES - 1


def test_recv_waits_no_longer_than_told(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        started = time.monotonic()
        assert dealer.recv(0.1) is None
        assert 0.09 < time.monotonic() - started < 5.0


def test_a_dealer_may_connect_before_the_router_is_there(address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(beat(7))
        with RouterEnd[Any](address, FrontendToCore) as late:
            assert receive(late, 1)[0][1].epoch == 7


def test_sending_to_a_peer_that_left_or_never_was_says_so(router: RouterEnd[Any], address: str) -> None:
    with pytest.raises(PeerGoneError):
        router.send(b"nobody", beat(1))
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(beat(1))
        peer = receive(router, 1)[0][0]

    def gone() -> bool:
        try:
            router.send(peer, beat(2))
        except PeerGoneError:
            return True
        return False

    wait_for(gone)


def test_a_router_says_when_a_peer_does_not_read(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as deaf, DealerEnd[Any](address, CoreToFrontend) as other:
        deaf.send(beat(1))
        other.send(beat(2))
        peers = {message.epoch: peer for peer, message in receive(router, 2)}
        count = send_until_busy(lambda message: router.send(peers[1], message))
        assert count >= HIGH_WATER_MARK
        router.send(peers[2], beat(3))  # the others are not held up
        assert next_of(other).epoch == 3
        for number in range(count):  # and nothing that was taken is lost
            assert next_of(deaf).epoch == number


def test_a_dealer_says_when_the_router_does_not_read(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        count = send_until_busy(dealer.send)
        assert [message.epoch for _, message in receive(router, count)] == list(range(count))


def test_malformed_messages_are_counted_and_reported_and_the_next_is_read(
    router: RouterEnd[Any], address: str
) -> None:
    seen: list[tuple[bytes, WireError]] = []
    router.on_malformed = lambda peer, error: seen.append((peer, error))
    with DealerEnd[Any](address, CoreToFrontend, identity=b"me") as dealer:
        for garbage in ([b""], [b"\xc1"], [b"x" * 1000], [b"\x91\xa1x", b"more"], [b""] * 300):
            dealer._socket.send_multipart(garbage)
        dealer.send(RequestFailed(epoch=1, handle=1, code="c", message="for another inbox"))
        dealer.send(beat(9))
        assert receive(router, 1)[0][1].epoch == 9
    assert router.dropped == 6
    assert [peer for peer, _ in seen] == [b"me"] * 6


def test_a_dealer_counts_malformed_messages_too(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(beat(1))
        peer = receive(router, 1)[0][0]
        router._socket.send_multipart([peer, b"garbage"])
        router.send(peer, beat(2))
        assert next_of(dealer).epoch == 2
        assert dealer.dropped == 1


def test_closed_ends_say_so(router: RouterEnd[Any], address: str) -> None:
    dealer = DealerEnd[Any](address, CoreToFrontend)
    dealer.close()
    dealer.close()
    assert dealer.closed
    with pytest.raises(ClosedChannelError):
        dealer.send(beat(1))
    with pytest.raises(ClosedChannelError):
        dealer.recv_nowait()


def test_close_hands_over_what_was_queued(router: RouterEnd[Any], address: str) -> None:
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        for number in range(500):
            dealer.send(beat(number))
    assert [message.epoch for _, message in receive(router, 500)] == list(range(500))


# ------------------------------------------------------------------------------------ addresses and files


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "tcp://127.0.0.1:5555",
        "ipc://",
        "ipc://relative",
        "ipc:/x",
        "/x",
        "inproc://x",
        "ipc:///" + "x" * 101,
    ],
)
def test_addresses_that_are_not_opened(bad: str) -> None:
    with pytest.raises(ConfigError, match="address"):
        check_address(bad)
    for kind in (RouterEnd, DealerEnd):
        with pytest.raises(ConfigError, match="address"):
            kind(bad, FrontendToCore)


def test_the_longest_address_works(tmp_path: Path) -> None:
    name = "x" * (MAX_IPC_PATH - len(str(tmp_path)) - 1)
    if not name:
        pytest.skip(f"the folder of temporary files has too long a name: {tmp_path}")
    with RouterEnd[Any](f"ipc://{tmp_path}/{name}", FrontendToCore) as end:
        assert is_socket(end.address)


def test_the_socket_file_is_for_its_owner_alone_and_goes_with_the_router(address: str) -> None:
    assert not is_socket(address)
    with RouterEnd[Any](address, FrontendToCore):
        assert is_socket(address)
        assert stat.S_IMODE(socket_path(address).stat().st_mode) == 0o600
    assert not socket_path(address).exists()


def test_a_second_router_does_not_take_over_the_address_of_a_living_one(
    router: RouterEnd[Any], address: str
) -> None:
    assert is_serving(address)
    with pytest.raises(ConfigError, match="in use"):
        RouterEnd(address, FrontendToCore)
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(beat(1))
        assert receive(router, 1)[0][1].epoch == 1


def test_a_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        RouterEnd(f"ipc://{tmp_path}/notes", FrontendToCore)
    assert (tmp_path / "notes").read_text() == "precious"


def test_the_socket_file_of_a_killed_engine_is_replaced(address: str) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path(address)))
    assert is_socket(address) and not is_serving(address)
    with RouterEnd[Any](address, FrontendToCore) as router, DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(beat(1))
        receive(router, 1)


def test_a_folder_that_does_not_exist_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot bind"):
        RouterEnd(f"ipc://{tmp_path}/missing/x", FrontendToCore)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_is_not_let_in(tmp_path: Path) -> None:
    """Even where the file's mode and the folder's would let it pass."""
    folder = Path(os.path.realpath("/tmp")) / f"tercet-test-{os.getpid()}"
    folder.mkdir(mode=0o777)
    address = f"ipc://{folder}/x"
    try:
        with RouterEnd[Any](address, FrontendToCore) as router:
            folder.chmod(0o777)
            socket_path(address).chmod(0o666)
            assert _send_as(os.getuid(), address) == 0
            assert len(receive(router, 1)) == 1
            assert _send_as(65534, address) == 0
            time.sleep(0.3)
            assert router.recv_nowait() is None
    finally:
        folder.rmdir()


def _send_as(uid: int, address: str) -> int:
    """Connect as another user and send a message; a fork, since that user may not read our interpreter's files."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(uid)
            context = zmq.Context()
            with context.socket(zmq.DEALER) as socket:
                socket.setsockopt(zmq.LINGER, 300)
                socket.connect(address)
                socket.send(Encoder().encode_bytes(beat(1))[0])
            context.term()
        finally:
            os._exit(0 if sys.exception() is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------------------------ waiting


def test_a_waiter_wakes_for_sockets_and_descriptors(router: RouterEnd[Any], address: str) -> None:
    read_fd, write_fd = os.pipe()
    waiter = Waiter()
    waiter.add(router)
    waiter.add(read_fd)
    assert waiter.wait(0.01) == set()
    os.write(write_fd, b"x")
    assert waiter.wait(TIMEOUT_S) == {read_fd}
    waiter.remove(read_fd)
    with DealerEnd[Any](address, CoreToFrontend) as dealer:
        dealer.send(beat(1))
        started = time.monotonic()
        while router.recv_nowait() is None:
            assert waiter.wait(TIMEOUT_S) == set()
        assert time.monotonic() - started < TIMEOUT_S / 2
    os.close(read_fd)
    os.close(write_fd)


# ------------------------------------------------------------------------------------ asyncio


class Echo(threading.Thread):
    """A router on a thread of its own that sends heartbeats back, in bursts of its own choosing."""

    def __init__(self, address: str, *, unasked: int = 0) -> None:
        super().__init__()
        self.end = RouterEnd[Any](address, FrontendToCore)
        self.stopping = False
        self.unasked = unasked

    def __enter__(self) -> Echo:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.join()
        self.end.close()

    def run(self) -> None:
        rng, waiter = random.Random(1), Waiter()
        waiter.add(self.end)
        while not self.stopping:
            waiter.wait(0.01)
            while (item := self.end.recv_nowait()) is not None:
                peer, message = item
                self._send(peer, message)
                if rng.random() < 0.01:
                    time.sleep(0.002)
                for number in range(self.unasked):
                    self._send(peer, Heartbeat(epoch=message.epoch, step=1 + number))

    def _send(self, peer: bytes, message: Heartbeat) -> None:
        while True:
            try:
                return self.end.send(peer, message)
            except PeerBusyError:
                time.sleep(0.001)
            except PeerGoneError:
                return None


def run_async(loop: str, main: Callable[[], Any]) -> Any:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_no_wakeup_is_lost_under_load_both_ways(loop: str, address: str) -> None:
    """Sends and arrivals interleave at random; a lost edge would leave a message lying until the next one."""
    rng = random.Random(0)
    total, received = 5000, []

    async def main() -> None:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            done = asyncio.Event()

            def on_message(message: Any) -> None:
                received.append(message.epoch)
                if len(received) == total:
                    done.set()

            dealer.start(on_message)
            sent = 0
            while sent < total:
                for _ in range(min(rng.choice([1, 1, 1, 5, 100]), total - sent)):
                    dealer.send(beat(sent))
                    sent += 1
                await asyncio.sleep(rng.choice([0, 0, 0.0005]))
            async with asyncio.timeout(TIMEOUT_S):
                await done.wait()

    with Echo(address):
        run_async(loop, main)
    assert received == list(range(total))


@pytest.mark.parametrize("loop", LOOPS)
def test_ping_pong_where_every_message_is_the_last_for_a_while(loop: str, address: str) -> None:
    """Each answer is waited for alone: nothing that comes later could wake the loop for it."""

    async def main() -> int:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            answers: asyncio.Queue[Any] = asyncio.Queue()
            dealer.start(answers.put_nowait)
            for number in range(500):
                dealer.send(beat(number))
                async with asyncio.timeout(TIMEOUT_S):
                    assert (await answers.get()).epoch == number
            return answers.qsize()

    with Echo(address):
        assert run_async(loop, main) == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_sending_from_the_handler_loses_nothing(loop: str, address: str) -> None:
    """A send reads the socket's state, and so uses up the edge that an arrival made."""
    received: list[int] = []

    async def main() -> None:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            done = asyncio.Event()

            def on_message(message: Any) -> None:
                if message.step:
                    return
                received.append(message.epoch)
                if message.epoch < 300:
                    dealer.send(beat(message.epoch + 1))
                else:
                    done.set()

            dealer.start(on_message)
            dealer.send(beat(0))
            async with asyncio.timeout(TIMEOUT_S):
                await done.wait()

    with Echo(address, unasked=3):
        run_async(loop, main)
    assert received == list(range(301))


@pytest.mark.parametrize("loop", LOOPS)
def test_what_came_before_start_is_delivered(loop: str, address: str) -> None:
    async def main() -> list[int]:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            for number in range(10):
                dealer.send(beat(number))
            await asyncio.sleep(0.2)
            answers: asyncio.Queue[Any] = asyncio.Queue()
            dealer.start(answers.put_nowait)
            async with asyncio.timeout(TIMEOUT_S):
                return [(await answers.get()).epoch for _ in range(10)]

    with Echo(address):
        assert run_async(loop, main) == list(range(10))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_handler_that_raises_does_not_stop_the_others(loop: str, address: str) -> None:
    received: list[int] = []
    errors: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: errors.append(context["exception"])
        )
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            done = asyncio.Event()

            def on_message(message: Any) -> None:
                received.append(message.epoch)
                if message.epoch == 199:
                    done.set()
                if message.epoch % 3 == 0:
                    raise ValueError("a bug in a handler")

            dealer.start(on_message)
            for number in range(200):
                dealer.send(beat(number))
            async with asyncio.timeout(TIMEOUT_S):
                await done.wait()

    with Echo(address):
        run_async(loop, main)
    assert received == list(range(200))
    assert len(errors) == 67


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("close_at", [0, 1, 63, 64])
def test_a_handler_may_close_its_end(loop: str, address: str, close_at: int) -> None:
    received: list[int] = []
    errors: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        dealer = AsyncDealerEnd[Any](address, CoreToFrontend)
        closed = asyncio.Event()

        def on_message(message: Any) -> None:
            received.append(message.epoch)
            if message.epoch == close_at:
                dealer.close()
                closed.set()

        for number in range(100):
            dealer.send(beat(number))
        await asyncio.sleep(0.2)  # so that all of them are there when it starts
        dealer.start(on_message)
        async with asyncio.timeout(TIMEOUT_S):
            await closed.wait()
        await asyncio.sleep(0.01)

    with Echo(address):
        run_async(loop, main)
    assert received == list(range(close_at + 1))
    assert errors == []


@pytest.mark.parametrize("loop", LOOPS)
def test_a_failed_send_keeps_the_arrivals_it_found(loop: str, address: str) -> None:
    """A send that finds the queue full has read the socket's state: what arrived must still be delivered."""

    async def main(router: RouterEnd[Any]) -> None:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            answers: asyncio.Queue[Any] = asyncio.Queue()
            dealer.start(answers.put_nowait)
            dealer.send(beat(0))
            peer = receive(router, 1)[0][0]
            send_until_busy(dealer.send)
            for number in range(200):
                router.send(peer, beat(number))
                time.sleep(0.001)  # noqa: ASYNC251  (the loop shall not see the arrival before the send below)
                # Its last send fails; one or two before may find room that the kernel has made meanwhile.
                send_until_busy(dealer.send)
                async with asyncio.timeout(TIMEOUT_S):
                    assert (await answers.get()).epoch == number

    with RouterEnd[Any](address, FrontendToCore) as router:
        run_async(loop, lambda: main(router))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_forked_child_leaves_the_messages_to_its_parent(loop: str, address: str) -> None:
    """A child that goes on with its parent's loop would be called for the parent's messages."""
    received: list[int] = []

    def leaves_it_alone(dealer: AsyncDealerEnd[Any]) -> bool:
        dealer._drain()
        try:
            dealer.send(beat(99))
        except ClosedChannelError as error:
            return "parent" in str(error) and not received
        return False

    def exit_code_of_child(dealer: AsyncDealerEnd[Any]) -> int:
        if not (pid := os.fork()):
            code = 2
            try:
                code = 0 if leaves_it_alone(dealer) else 1
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    async def main(router: RouterEnd[Any]) -> None:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            dealer.send(beat(0))
            peer = receive(router, 1)[0][0]
            done = asyncio.Event()

            def on_message(message: Any) -> None:
                received.append(message.epoch)
                if len(received) == 5:
                    done.set()

            dealer.start(on_message)
            for number in range(5):
                router.send(peer, beat(number))
            assert dealer._socket.poll(TIMEOUT_S * 1000)
            assert exit_code_of_child(dealer) == 0
            async with asyncio.timeout(TIMEOUT_S):
                await done.wait()

    with RouterEnd[Any](address, FrontendToCore) as router:
        run_async(loop, lambda: main(router))
        assert router.recv_nowait() is None
    assert received == list(range(5))


# ------------------------------------------------------------------------------------ nothing left


def _threads_and_descriptors() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def _use_everything(address: str) -> None:
    async def main() -> None:
        with AsyncDealerEnd[Any](address, CoreToFrontend) as dealer:
            answers: asyncio.Queue[Any] = asyncio.Queue()
            dealer.start(answers.put_nowait)
            dealer.send(Abort(epoch=1, handles=np.zeros(COPY_BYTES, np.uint64)))
            dealer.send(beat(1))
            async with asyncio.timeout(TIMEOUT_S):
                await answers.get()

    class Sink(Echo):
        def _send(self, peer: bytes, message: Any) -> None:
            if isinstance(message, Heartbeat):
                super()._send(peer, message)

    with Sink(address):
        run_async("asyncio", main)
    with DealerEnd[Any](address, CoreToFrontend) as dealer:  # nobody is there: it must not linger for ever
        dealer.send(Abort(epoch=1, handles=np.zeros(COPY_BYTES, np.uint64)))


def test_closed_ends_leave_no_thread_descriptor_or_file(address: str) -> None:
    _use_everything(address)  # zmq's own helper for zero-copy sends starts once and stays
    before = _threads_and_descriptors()
    for _ in range(5):
        _use_everything(address)
    wait_for(lambda: _threads_and_descriptors() == before)
