"""Errors of the wire.

IpcError (TercetError)
├── WireError             bytes that are not a message of this protocol; drop, count, go on
├── ClosedChannelError    this end was closed
├── PeerUnreachableError  a message could not be queued
│   ├── PeerGoneError     the peer has left
│   └── PeerBusyError     the peer does not read: its queue is full
└── ProcessError          a child process
    ├── CannotStartError  it ended, or gave no sign, before it was ready
    └── ProcessDiedError  it ended after it was ready
"""

from __future__ import annotations

from tercet.errors import TercetError


class IpcError(TercetError):
    """Base of the errors of the wire and of processes."""


class WireError(IpcError):
    """Bytes that are not a message of this protocol."""


class ClosedChannelError(IpcError):
    """This end of the channel was closed."""


class PeerUnreachableError(IpcError):
    """A message could not be queued for a peer."""


class PeerGoneError(PeerUnreachableError):
    """The peer has left."""


class PeerBusyError(PeerUnreachableError):
    """The peer does not read: its queue is full."""


class ProcessError(IpcError):
    """A child process ended when it should not have."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name


class CannotStartError(ProcessError):
    """The child ended, or gave no sign of life, before it was ready: starting it again would not help.

    `field` is the engine argument that it named as the cause, "" where it named none.
    """

    def __init__(self, name: str, problem: str, field: str = "") -> None:
        super().__init__(name, problem)
        self.field = field


class ProcessDiedError(ProcessError):
    """The child ended after it was ready."""
