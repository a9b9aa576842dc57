"""Responses that /v1/responses keeps, for later retrieval and as the beginning of further ones."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from tercet.frontend.server.response_shapes import ResponseBody

MAX_STORED: Final = 4096


@dataclass(slots=True)
class StoredResponse:
    """
    Attributes:
        response: as it is now.
        messages: the conversation up to and with its output, as chat messages.
        task: computes it, where it is computed in the background.
    """

    response: ResponseBody
    messages: list[dict[str, Any]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class ResponseStore(Protocol):
    """Where responses are kept, by their ids."""

    def put(self, stored: StoredResponse) -> None: ...

    def get(self, response_id: str) -> StoredResponse | None: ...

    def delete(self, response_id: str) -> bool: ...

    def cancel_all(self) -> None: ...


class MemoryStore:
    """Of one server. When it is full the oldest response that nothing computes any more makes room."""

    def __init__(self, max_stored: int = MAX_STORED) -> None:
        self._max_stored = max_stored
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, stored: StoredResponse) -> None:
        """Keep a response, in place of an earlier state of it."""
        self._stored[stored.response["id"]] = stored
        if len(self._stored) > self._max_stored:
            for response_id, one in self._stored.items():
                if one.task is None or one.task.done():
                    del self._stored[response_id]
                    break

    def get(self, response_id: str) -> StoredResponse | None:
        return self._stored.get(response_id)

    def delete(self, response_id: str) -> bool:
        """Forget a response, stopping what computes it; whether there was one."""
        stored = self._stored.pop(response_id, None)
        if stored is not None and stored.task is not None:
            stored.task.cancel()
        return stored is not None

    def cancel_all(self) -> None:
        """Stop everything that is computed in the background."""
        for stored in self._stored.values():
            if stored.task is not None:
                stored.task.cancel()
