"""A core that speaks the protocol from a test's script, in a thread of this process.

A frontend under test cannot tell it from a real one. What it sends lands in `received`; `send` answers. With
`answer` set, every AddRequest is answered by what that function returns.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tercet.ipc.channel import RouterEnd, Waiter
from tercet.ipc.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    Finish,
    FrontendToCore,
    Hello,
    Limits,
    Logprobs,
    ModelInfo,
    StepOutputs,
    Welcome,
)

M = TypeVar("M", bound=msgspec.Struct)

EPOCH = 77
VOCAB_SIZE = 1000
EOS = 2


def make_model(**fields: Any) -> ModelInfo:
    defaults: dict[str, Any] = {
        "name": "fake",
        "served_names": ["fake"],
        "max_model_len": 512,
        "vocab_size": VOCAB_SIZE,
        "dtype": "float32",
        "architecture": "Fake",
        "eos_token_ids": [EOS],
        "default_sampling": {"temperature": 0.5, "top_k": 7},
    }
    return ModelInfo(**{**defaults, **fields})


def make_limits(**fields: Any) -> Limits:
    defaults: dict[str, Any] = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "max_waiting": 1000,
        "max_logprobs": 20,
        "max_children": 64,
        "block_size": 16,
        "num_blocks": 1000,
    }
    return Limits(**{**defaults, **fields})


def step_outputs(
    tokens: dict[int, Sequence[int]],
    first: dict[int, int] | int = 0,
    finish: dict[int, Finish] | None = None,
    **fields: Any,
) -> StepOutputs:
    """Tokens by handle, as a step sends them; the offset column only where a request has not just one."""
    handles = list(tokens)
    counts = [len(tokens[handle]) for handle in handles]
    firsts = [first if isinstance(first, int) else first[handle] for handle in handles]
    offset = None if all(count == 1 for count in counts) else np.cumsum([0, *counts]).astype(np.int32)
    return StepOutputs(
        **{
            "epoch": EPOCH,
            "step": 1,
            "handle": np.array(handles, np.uint64),
            "first_index": np.array(firsts, np.int32),
            "token": np.array([token for handle in handles for token in tokens[handle]], np.int32),
            "finish": np.array([(finish or {}).get(handle, 0) for handle in handles], np.uint8),
            "offset": offset,
            **fields,
        }
    )


def logprob_columns(rows: Iterable[tuple[int, Sequence[tuple[int, float]], int]]) -> Logprobs:
    """Rows of (handle, [(token, logprob), …] with the chosen token first, rank)."""
    listed = list(rows)
    return Logprobs(
        key=np.array([handle for handle, _, _ in listed], np.uint64),
        token_ids=np.array([[token for token, _ in entries] for _, entries, _ in listed], np.int32),
        logprobs=np.array([[value for _, value in entries] for _, entries, _ in listed], np.float32),
        rank=np.array([rank for _, _, rank in listed], np.int32),
    )


class FakeCore:
    """Use as a context manager; `address` is where to connect."""

    def __init__(
        self,
        bundle: TokenizerBundle | None = None,
        *,
        answer: Callable[[AddRequest], list[msgspec.Struct]] | None = None,
        welcome: dict[str, Any] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fake-core-")
        self.address = f"ipc://{Path(self._folder.name) / 'core'}"
        self.received: queue.Queue[msgspec.Struct] = queue.Queue()
        self.answer = answer
        self.welcome_fields: dict[str, Any] = {
            "epoch": EPOCH,
            "protocol_version": PROTOCOL_VERSION,
            "version": "0",
            "pid": os.getpid(),
            "model": make_model(),
            "limits": make_limits(),
            "files": bundle.to_files() if bundle is not None else {},
            "heartbeat_s": 0.05,
            **(welcome or {}),
        }
        self.silent = False  # receives, and answers no Hello
        self._outbox: deque[msgspec.Struct | None] = deque()
        self._wake_r, self._wake_w = os.pipe()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-core")

    def send(self, *messages: msgspec.Struct) -> None:
        """Send to the frontend that attached last."""
        self._outbox.extend(messages)
        os.write(self._wake_w, b"x")

    def expect(self, kind: type[M], timeout_s: float = 10.0) -> M:
        """The next message of this kind; others before it are skipped."""
        while not isinstance(message := self.received.get(timeout=timeout_s), kind):
            pass
        return message

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._bound.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave without a word. Idempotent."""
        if self._thread.is_alive():
            self._outbox.append(None)
            os.write(self._wake_w, b"x")
            self._thread.join()
            os.close(self._wake_r)
            os.close(self._wake_w)
            self._folder.cleanup()

    def _run(self) -> None:
        with RouterEnd[FrontendToCore](self.address, FrontendToCore) as end:
            waiter = Waiter()
            waiter.add(end)
            waiter.add(self._wake_r)
            self._bound.set()
            peer = b""
            while True:
                if self._wake_r in waiter.wait(None):
                    os.read(self._wake_r, 4096)
                while (arrived := end.recv_nowait()) is not None:
                    peer, message = arrived
                    self.received.put(message)
                    for reply in self._replies(message):
                        end.send(peer, reply)
                while self._outbox:
                    if (outgoing := self._outbox.popleft()) is None:
                        return
                    end.send(peer, outgoing)

    def _replies(self, message: FrontendToCore) -> list[msgspec.Struct]:
        if isinstance(message, Hello) and not self.silent:
            return [Welcome(**self.welcome_fields)]
        if isinstance(message, AddRequest) and self.answer is not None:
            return self.answer(message)
        return []
