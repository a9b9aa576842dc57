"""A frontend of messages alone: it attaches to a core, sends what a test tells it to, and books what comes.

As a program, `python -m tests.core_proc.raw_frontend ADDRESS HANDLE MAX_TOKENS`, it asks for one request and
prints a line for each token, so that a test can kill or stop it in the middle, and in the end how many messages
they came in and why they ended. If that was for leaving them unread, it asks for five more tokens.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from tercet.ipc.channel import DealerEnd
from tercet.ipc.errors import PeerBusyError
from tercet.ipc.host import host_id
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Call,
    CallBody,
    CoreToFrontend,
    Finish,
    GetStats,
    Goodbye,
    Heartbeat,
    Hello,
    Reply,
    RequestFailed,
    Stats,
    StepOutputs,
    Welcome,
)
from tests.core_proc.harness import make_request

TIMEOUT_S = 20.0


class RawFrontend:
    """One connection. Not attached before `hello`."""

    def __init__(self, address: str) -> None:
        self.end: DealerEnd[CoreToFrontend] = DealerEnd(address, CoreToFrontend)
        self.welcome: Welcome | None = None
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, Finish] = {}
        self.failures: dict[int, RequestFailed] = {}
        self.replies: dict[int, Reply] = {}
        self.num_outputs = 0  # messages
        self.goodbye: Goodbye | None = None
        self._next_call = 1

    def __enter__(self) -> RawFrontend:
        return self

    def __exit__(self, *_: object) -> None:
        if self.welcome is not None and not self.end.closed:
            try:
                self.end.send(Goodbye(epoch=self.epoch))
            except PeerBusyError:
                pass
        self.end.close()

    @property
    def epoch(self) -> int:
        assert self.welcome is not None
        return self.welcome.epoch

    def hello(self, **changes: Any) -> None:
        hello = Hello(protocol_version=PROTOCOL_VERSION, name="raw", pid=os.getpid(), host=host_id())
        self.end.send(msgspec.structs.replace(hello, **changes))

    def attach(self) -> RawFrontend:
        self.hello()
        self.read_until(lambda: self.welcome is not None)
        return self

    def add(self, message: AddRequest, **changes: Any) -> None:
        for child in range(len(message.seeds)):
            self.tokens.setdefault(message.handle + child, [])
        self.end.send(msgspec.structs.replace(message, **({"epoch": self.epoch} | changes)))

    def abort(self, message: Abort) -> None:
        self.end.send(message)

    def ask(self, body: CallBody) -> int:
        """Send a call; returns its id."""
        call_id = self._next_call
        self._next_call += 1
        self.end.send(Call(epoch=self.epoch, call_id=call_id, body=body))
        return call_id

    def call(self, body: CallBody) -> Reply:
        call_id = self.ask(body)
        self.read_until(lambda: call_id in self.replies)
        return self.replies[call_id]

    def stats(self) -> Stats:
        stats = self.call(GetStats()).stats
        assert stats is not None
        return stats

    def read_until(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            message = self.end.recv(0.05)
            if message is not None:
                self._on_message(message)
            if time.monotonic() > deadline:
                raise TimeoutError("what the test waits for did not come")

    def read_all_finished(self, *handles: int) -> None:
        self.read_until(lambda: all(self.finish.get(handle) for handle in handles))

    def _on_message(self, message: CoreToFrontend) -> None:
        match message:
            case Welcome():
                self.welcome = message
            case StepOutputs():
                self._on_outputs(message)
            case RequestFailed():
                self.failures[message.handle] = message
                self.finish[message.handle] = Finish.ERROR
            case Reply():
                self.replies[message.call_id] = message
            case Goodbye():
                self.goodbye = message
            case Stats() | Heartbeat():
                pass

    def _on_outputs(self, outputs: StepOutputs) -> None:
        self.num_outputs += 1
        offset = outputs.offset.tolist() if outputs.offset is not None else range(len(outputs.handle) + 1)
        for i, handle in enumerate(outputs.handle.tolist()):
            stream = self.tokens[handle]
            assert outputs.first_index[i] == len(stream), "a token was lost or repeated"
            stream += outputs.token[offset[i] : offset[i + 1]].tolist()
            self.finish[handle] = Finish(int(outputs.finish[i]))


def main(address: str, handle: int, max_tokens: int) -> None:
    with RawFrontend(address) as frontend:
        frontend.attach()
        frontend.add(make_request(4, handle=handle, max_tokens=max_tokens))
        while not frontend.finish.get(handle):
            count = len(frontend.tokens[handle])
            frontend.read_until(
                lambda count=count: len(frontend.tokens[handle]) > count or bool(frontend.finish.get(handle))  # type: ignore[misc]
            )
            for token in frontend.tokens[handle][count:]:
                print(token, flush=True)
        failure = frontend.failures.get(handle)
        print(
            "end", frontend.num_outputs, failure.code if failure else frontend.finish[handle].name, flush=True
        )
        if failure is not None and failure.code == "unread":
            frontend.add(make_request(4, handle=handle + 1, max_tokens=5))
            frontend.read_all_finished(handle + 1)
            print("again", *frontend.tokens[handle + 1], flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
