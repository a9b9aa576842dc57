"""How long does a message take from one process to another, how many pass in a second, and which way is cheapest?

Two processes on a Unix socket. Latency is half of a round trip in which both sides block until something comes;
the rate is that of a flood of messages, sent as fast as the queues take them. The last benchmark compares the
ways in which a large array can travel: inside the message, as a frame that the socket copies, or as one that it
does not copy. From it `codec.INLINE_BYTES` and `channel.COPY_BYTES` were chosen.

    python -m pytest benchmarks/bench_channel.py --benchmark-columns=median,iqr,ops
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.channel_peer import ECHO_INBOX, FLOOD, LAST, PING, tune
from tercet.ipc.channel import COPY_BYTES, RouterEnd, Waiter
from tercet.ipc.codec import INLINE_BYTES
from tercet.ipc.errors import PeerBusyError
from tercet.ipc.messages import Abort, Shutdown

ROOT = Path(__file__).resolve().parents[1]
SIZES_KB = (1, 20, 1024)
NEVER = 1 << 40
WAYS = {"inline": (NEVER, NEVER), "frame, copied": (0, NEVER), "frame, not copied": (0, 0)}


class Pair:
    """A router here and a dealer in another process."""

    def __init__(self, end: RouterEnd[Any], inline_bytes: int, copy_bytes: int) -> None:
        self.end = end
        self.waiter = Waiter()
        self.waiter.add(end)
        self.peer = self.receive()[0]
        tune(end, inline_bytes, copy_bytes)

    def receive(self) -> tuple[bytes, Any]:
        while (item := self.end.recv_nowait()) is None:
            self.waiter.wait(None)
        return item

    def ping(self, handles: np.ndarray) -> None:
        self.end.send(self.peer, Abort(epoch=PING, handles=handles))
        self.receive()

    def flood(self, handles: np.ndarray, count: int) -> None:
        for number in range(count):
            message = Abort(epoch=LAST if number == count - 1 else FLOOD, handles=handles)
            while not self._try_send(message):
                self.waiter.wait(0.0005)
        self.receive()

    def _try_send(self, message: Abort) -> bool:
        try:
            self.end.send(self.peer, message)
        except PeerBusyError:
            return False
        return True


@contextmanager
def open_pair(inline_bytes: int = INLINE_BYTES, copy_bytes: int = COPY_BYTES) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory(prefix="b-", dir="/tmp") as folder:
        address = f"ipc://{folder}/x"
        with RouterEnd[Any](address, ECHO_INBOX) as end:
            command = [
                sys.executable,
                "-m",
                "benchmarks.channel_peer",
                address,
                str(inline_bytes),
                str(copy_bytes),
            ]
            with subprocess.Popen(command, cwd=ROOT) as process:
                try:
                    pair = Pair(end, inline_bytes, copy_bytes)
                    yield pair
                    end.send(pair.peer, Shutdown(epoch=0))
                    process.wait(10)
                finally:
                    process.kill()


def array(kilobytes: int) -> np.ndarray:
    return np.zeros(kilobytes * 128, np.uint64)


@pytest.mark.parametrize("kilobytes", SIZES_KB)
def test_latency(benchmark: BenchmarkFixture, kilobytes: int) -> None:
    with open_pair() as pair:
        info = {"piece": "channel: round trip (twice the latency)", "n": f"{kilobytes} KB"}
        benchmark.extra_info.update(info)
        rounds = 2000 if kilobytes < 1024 else 300
        benchmark.pedantic(pair.ping, (array(kilobytes),), rounds=rounds, warmup_rounds=50)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kilobytes", SIZES_KB)
def test_rate(benchmark: BenchmarkFixture, kilobytes: int) -> None:
    count = 5000 if kilobytes < 1024 else 200
    with open_pair() as pair:
        info = {
            "piece": "channel: a message of a flood",
            "n": f"{kilobytes} KB",
            "per_round": count,
        }
        benchmark.extra_info.update(info)
        benchmark.pedantic(pair.flood, (array(kilobytes), count), rounds=7, warmup_rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kilobytes", [1, 4, 16, 32, 64, 128, 256, 1024])
def test_ways_of_an_array(benchmark: BenchmarkFixture, kilobytes: int, way: str) -> None:
    with open_pair(*WAYS[way]) as pair:
        info = {"piece": f"channel: round trip, array {way}", "n": f"{kilobytes} KB"}
        benchmark.extra_info.update(info)
        benchmark.pedantic(pair.ping, (array(kilobytes),), rounds=500, warmup_rounds=50)  # type: ignore[no-untyped-call]
