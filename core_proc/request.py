"""A request as the core knows it: one child of an AddRequest, from arrival to its finish."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tercet.core_proc.prefix_cache import BlockHash
from tercet.ipc.messages import AddRequest, Sampling

NO_ROW = -1


@dataclass(slots=True, eq=False)
class Prompt:
    """What the children of one AddRequest share."""

    message: AddRequest
    root: BlockHash
    hashes: list[BlockHash] = field(default_factory=list)  # of the prompt's full blocks
    num_ended: int = 0  # children
    longest_output: int = 0  # tokens, of the children that have ended


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. While it runs, its tokens live in its row; while it waits, in `token_ids`."""

    frontend: int
    handle: int
    seed: int
    prompt: Prompt
    token_ids: np.ndarray  # i32, prompt and outputs; valid while row == NO_ROW
    arrival: int  # order of arrival in the core
    arrival_s: float  # core's monotonic clock
    max_total: int  # prompt and outputs together, at most
    row: int = NO_ROW
    hashes: list[BlockHash] = field(default_factory=list)
    started_s: float = -1.0  # first step
    first_token_s: float = -1.0  # its result was applied
    last_token_s: float = -1.0  # valid while row == NO_ROW
    trace: str = ""  # W3C traceparent of the core's own span of it; empty where it is not traced
    started_sent: bool = False  # the frontend has been told the facts of its start
    num_cached_tokens: int = -1  # at the first admission
    num_preemptions: int = 0
    wait_for_step: int = -1  # results up to this step must be applied before it is admitted again
    prompt_logprobs_from: int = -1  # first prompt position still to be scored

    @property
    def sampling(self) -> Sampling:
        return self.prompt.message.sampling

    @property
    def priority(self) -> int:
        return self.prompt.message.priority

    @property
    def prompt_len(self) -> int:
        return self.prompt.message.prompt_len

    @property
    def order(self) -> tuple[int, int]:
        """Sort key under the priority policy: smaller runs earlier."""
        return (self.priority, self.arrival)
