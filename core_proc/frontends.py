"""The frontends attached to this core: who they are, whether they live, what they have not read yet."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tercet.core_proc.backlog import Backlog
from tercet.ipc.host import host_id
from tercet.ipc.messages import Hello
from tercet.ipc.telemetry import FrontendReport

_MAX_NAME = 80


@dataclass(slots=True)
class Frontend:
    """One attached frontend. `slot` is its number in the scheduler's columns."""

    slot: int
    peer: bytes  # identity of its socket
    name: str
    pidfd: int = -1  # readable once its process is gone; -1 where it runs on another host
    report: FrontendReport | None = None  # its last one
    backlog: Backlog | None = None  # what it has yet to be sent, while it does not read
    is_overrun: bool = False  # its backlog went beyond the bound: it has no requests until it reads


class Frontends:
    """Frontends by identity, by slot and by pidfd."""

    def __init__(self) -> None:
        self.by_peer: dict[bytes, Frontend] = {}
        self.by_slot: dict[int, Frontend] = {}
        self.by_pidfd: dict[int, Frontend] = {}
        self._next_slot = 1
        self._host = host_id()

    def __len__(self) -> int:
        return len(self.by_peer)

    def attach(self, peer: bytes, hello: Hello) -> Frontend:
        """Admit a frontend, watching its process where it runs on this host."""
        frontend = Frontend(self._next_slot, peer, hello.name[:_MAX_NAME])
        self._next_slot += 1
        if hello.host == self._host and 0 < hello.pid < 2**31:
            try:
                frontend.pidfd = os.pidfd_open(hello.pid)
                self.by_pidfd[frontend.pidfd] = frontend
            except OSError:  # gone already, or in another pid namespace: its socket will tell
                frontend.pidfd = -1
        self.by_peer[peer] = self.by_slot[frontend.slot] = frontend
        return frontend

    def detach(self, frontend: Frontend) -> None:
        """Forget a frontend."""
        self.by_peer.pop(frontend.peer, None)
        self.by_slot.pop(frontend.slot, None)
        if frontend.pidfd >= 0:
            self.by_pidfd.pop(frontend.pidfd, None)
            os.close(frontend.pidfd)
            frontend.pidfd = -1
