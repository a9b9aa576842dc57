"""Tensor parallelism as the layers see it: a rank, a world size, and two collectives.

The collectives themselves (NCCL, gloo, shared memory) are handed in; with one rank there are none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tercet.errors import ConfigError


class Communicator(Protocol):
    """Collectives over the ranks of one tensor-parallel group."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks; may reuse x."""
        ...

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """The ranks' tensors joined along dim, in rank order."""
        ...


@dataclass(frozen=True)
class ParallelContext:
    """This worker's place in its tensor-parallel group.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: number of ranks.
        communicator: needed when world_size > 1.
    """

    rank: int = 0
    world_size: int = 1
    communicator: Communicator | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ConfigError("rank", f"must lie in [0, {self.world_size}); got {self.rank}")
        if self.world_size > 1 and self.communicator is None:
            raise ConfigError("tensor_parallel_size", f"{self.world_size} ranks need a communicator")

    def all_reduce(self, x: Tensor) -> Tensor:
        return x if self.communicator is None else self.communicator.all_reduce(x)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        return x if self.communicator is None else self.communicator.all_gather(x, dim)

    def share_of(self, total: int, what: str) -> int:
        """This rank's share of `total`, which must divide evenly.

        Raises:
            ConfigError: it does not.
        """
        if total % self.world_size:
            raise ConfigError("tensor_parallel_size", f"{self.world_size} does not divide {what} ({total})")
        return total // self.world_size
