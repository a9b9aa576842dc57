"""How much unfinished work this server takes on, counted before any of it is done.

A request is counted n times, and once for each prompt of a list. Counting costs no copy and no tokenizing, so
a refusal takes microseconds however large the request was.
"""

from __future__ import annotations

from tercet.frontend.server.errors import overloaded
from tercet.frontend.server.settings import AdmissionLimits

BYTES_PER_TOKEN = 16
"""Before text is tokenized it counts as a token for each so many bytes: fewer than there will be."""


class Ticket:
    """One request's share of the limits. `release` gives it back; both methods are idempotent."""

    __slots__ = ("_admission", "_num_bytes", "_num_requests", "_num_tokens")

    def __init__(self, admission: Admission, num_bytes: int) -> None:
        self._admission = admission
        self._num_bytes = num_bytes
        self._num_requests = 0
        self._num_tokens = 0

    def count(self, num_requests: int, num_prompt_tokens: int) -> None:
        """Count what the body has turned out to hold.

        Raises:
            ApiError: 429, it is too much now.
        """
        self._admission.take(num_requests, num_prompt_tokens)
        self._num_requests, self._num_tokens = num_requests, num_prompt_tokens

    def tokenized(self, num_prompt_tokens: int) -> None:
        """The true number of waiting prompt tokens; from here on the estimate no longer counts."""
        self._admission.num_waiting_prompt_tokens += num_prompt_tokens - self._num_tokens
        self._num_tokens = num_prompt_tokens

    def started(self) -> None:
        """The first token has come: the prompt waits no more."""
        self.tokenized(0)

    def release(self) -> None:
        """The request has ended."""
        self.started()
        self._admission.num_requests -= self._num_requests
        self._admission.num_bytes -= self._num_bytes
        self._num_requests = self._num_bytes = 0


class Admission:
    """The counts of one server.

    Attributes:
        num_requests, num_waiting_prompt_tokens, num_bytes: of unfinished requests, now.
        num_refused: requests refused so far.
    """

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.num_requests = 0
        self.num_waiting_prompt_tokens = 0
        self.num_bytes = 0
        self.num_refused = 0

    @property
    def is_full(self) -> bool:
        """Whether one more request would be refused."""
        most = self.limits.max_requests
        return bool(most) and self.num_requests >= most

    def admit(self, num_bytes: int) -> Ticket:
        """Let in a request whose body has so many bytes.

        Raises:
            ApiError: 429.
        """
        most = self.limits.max_body_bytes_in_flight
        if self.is_full:
            raise self._refusal("too many unfinished requests")
        if most and self.num_bytes + num_bytes > most:
            raise self._refusal("too many bytes of unfinished requests")
        self.num_bytes += num_bytes
        return Ticket(self, num_bytes)

    def take(self, num_requests: int, num_prompt_tokens: int) -> None:
        """For `Ticket.count`."""
        limits = self.limits
        if limits.max_requests and self.num_requests + num_requests > limits.max_requests:
            raise self._refusal("too many unfinished requests")
        most = limits.max_waiting_prompt_tokens
        if most and self.num_waiting_prompt_tokens + num_prompt_tokens > most:
            raise self._refusal("too many prompt tokens are waiting")
        self.num_requests += num_requests
        self.num_waiting_prompt_tokens += num_prompt_tokens

    def _refusal(self, why: str) -> Exception:
        self.num_refused += 1
        return overloaded(f"the server is overloaded: {why}; try again later")
