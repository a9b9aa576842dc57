"""Layers with weights, cut for tensor parallelism, and how each takes its part of a checkpoint's tensor.

A layer knows its own rank's shape and which rows or columns of a full tensor are its own. Where a tensor
comes from, and what the checkpoint calls it, is the loader's business. With one rank every cut is the whole.

Source of the cuts: Megatron-LM, Shoeybi et al. 2019, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tercet import ops
from tercet.worker_proc.parallel import ParallelContext


@dataclass(frozen=True)
class Placement:
    """Where and how a model's weights are made."""

    device: torch.device
    dtype: torch.dtype
    parallel: ParallelContext = field(default_factory=ParallelContext)

    def empty(self, *shape: int) -> nn.Parameter:
        """An uninitialised, frozen parameter."""
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device), requires_grad=False)


class WeightedLayer(nn.Module):
    """A layer that takes its weights from full, unsharded checkpoint tensors."""

    def shards(self, parameter: str) -> tuple[str, ...]:
        """Names of the checkpoint tensors that make up a parameter; ('',) where it is one tensor."""
        return ("",)

    def load_weight(self, parameter: str, loaded: Tensor, shard: str = "") -> None:
        """Copy this rank's part of a full tensor into a parameter.

        Args:
            parameter: 'weight' or 'bias'.
            loaded: the full tensor, on any device and of any float dtype.
            shard: which of `shards(parameter)` it is; '' for the whole parameter.

        Raises:
            ValueError: the shape is not the one expected.
        """
        _copy(self.get_parameter(parameter), loaded)


def _copy(target: Tensor, loaded: Tensor) -> None:
    if target.shape != loaded.shape:
        raise ValueError(f"has shape {list(loaded.shape)}, expected {list(target.shape)}")
    target.copy_(loaded)


def _expect(loaded: Tensor, dim: int, size: int) -> None:
    if loaded.dim() <= dim or loaded.shape[dim] != size:
        raise ValueError(f"has shape {list(loaded.shape)}, expected {size} in dimension {dim}")


class RMSNorm(WeightedLayer):
    """Root-mean-square normalisation; `weight_offset` 1 for Gemma, which stores weight - 1."""

    def __init__(self, size: int, eps: float, place: Placement, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = place.empty(size)
        self.eps = eps
        self.weight_offset = weight_offset

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.weight_offset)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Normalised x + residual, and that sum."""
        if residual is None:
            return self(x), x
        return ops.add_rms_norm(x, *self.preceding(residual))

    def preceding(self, residual: Tensor) -> ops.PrecedingNorm:
        """This norm, after `residual` has been added, as operations take it that begin with it."""
        return ops.PrecedingNorm(residual, self.weight, self.eps, self.weight_offset)


class MergedColumnParallelLinear(WeightedLayer):
    """Several linear layers over one input as one product, each cut by output rows.

    Args:
        in_size: size of the input, whole on every rank.
        out_sizes: full output size of each; each rank computes its share of each, one after another.
        shard_names: what the parts are called, e.g. ('gate', 'up').
    """

    def __init__(
        self,
        in_size: int,
        out_sizes: Sequence[int],
        shard_names: Sequence[str],
        *,
        bias: bool,
        place: Placement,
    ) -> None:
        super().__init__()
        self.rank = place.parallel.rank
        self.full_sizes = dict(zip(shard_names, out_sizes, strict=True))
        self.local_sizes = {
            name: self.local_size(name, size, place.parallel) for name, size in self.full_sizes.items()
        }
        out_local = sum(self.local_sizes.values())
        self.weight = place.empty(out_local, in_size)
        self.bias = place.empty(out_local) if bias else None

    def local_size(self, name: str, full: int, parallel: ParallelContext) -> int:
        """Rows of part `name` on one rank."""
        return parallel.share_of(full, f"the output of {name or 'a layer'}")

    def local_start(self, name: str) -> int:
        """First row of the full part `name` that is this rank's."""
        return self.rank * self.local_sizes[name]

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def after_norm(self, norm: RMSNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The product of norm(x + residual), and that sum."""
        if residual is None:
            return self(norm(x)), x
        return ops.add_rms_norm_linear(x, norm.preceding(residual), self.weight, self.bias)

    def shards(self, parameter: str) -> tuple[str, ...]:
        return tuple(self.full_sizes)

    def load_weight(self, parameter: str, loaded: Tensor, shard: str = "") -> None:
        if shard not in self.full_sizes:  # one tensor holds all the parts
            _expect(loaded, 0, sum(self.full_sizes.values()))
            for name, part in zip(
                self.full_sizes, torch.split(loaded, list(self.full_sizes.values())), strict=True
            ):
                self.load_weight(parameter, part, name)
            return
        _expect(loaded, 0, self.full_sizes[shard])
        names = list(self.local_sizes)
        start = sum(self.local_sizes[name] for name in names[: names.index(shard)])
        target = self.get_parameter(parameter).narrow(0, start, self.local_sizes[shard])
        _copy(target, loaded.narrow(0, self.local_start(shard), self.local_sizes[shard]))


class ColumnParallelLinear(MergedColumnParallelLinear):
    """A linear layer cut by output rows; the output stays cut."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, place: Placement) -> None:
        super().__init__(in_size, (out_size,), ("",), bias=bias, place=place)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value projections as one product, cut by heads.

    With more ranks than KV heads each KV head is held by several ranks.

    Attributes:
        num_heads, num_kv_heads: heads on this rank.
    """

    def __init__(
        self, in_size: int, head_dim: int, num_heads: int, num_kv_heads: int, *, bias: bool, place: Placement
    ) -> None:
        parallel = place.parallel
        self.kv_copies = max(1, parallel.world_size // num_kv_heads)
        parallel.share_of(num_kv_heads * self.kv_copies, "the number of KV heads")
        sizes = (num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim)
        super().__init__(in_size, sizes, ("q", "k", "v"), bias=bias, place=place)
        self.num_heads = parallel.share_of(num_heads, "the number of attention heads")
        self.num_kv_heads = num_kv_heads * self.kv_copies // parallel.world_size

    def local_size(self, name: str, full: int, parallel: ParallelContext) -> int:
        copies = 1 if name == "q" else self.kv_copies
        return parallel.share_of(full * copies, f"the {name} projection")

    def local_start(self, name: str) -> int:
        copies = 1 if name == "q" else self.kv_copies
        return self.rank // copies * self.local_sizes[name]


class RowParallelLinear(WeightedLayer):
    """A linear layer cut by input columns: takes a cut input, sums the ranks' products."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, place: Placement) -> None:
        super().__init__()
        self.parallel = place.parallel
        self.in_size = in_size
        self.weight = place.empty(out_size, self.parallel.share_of(in_size, "the input of a layer"))
        self.bias = place.empty(out_size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel.world_size == 1:
            return ops.linear(x, self.weight, self.bias)
        out = self.parallel.all_reduce(ops.linear(x, self.weight))
        return out if self.bias is None else out + self.bias  # once, not once per rank

    def load_weight(self, parameter: str, loaded: Tensor, shard: str = "") -> None:
        if parameter == "weight":
            _expect(loaded, 1, self.in_size)
            local = self.weight.shape[1]
            loaded = loaded.narrow(1, self.parallel.rank * local, local)
        _copy(self.get_parameter(parameter), loaded)


class VocabParallelEmbedding(WeightedLayer):
    """Token embedding cut by vocabulary; the vocabulary is padded to a multiple of the ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, place: Placement) -> None:
        super().__init__()
        self.parallel = place.parallel
        self.vocab_size = vocab_size
        local = -(-vocab_size // self.parallel.world_size)
        self.start = self.parallel.rank * local
        self.weight = place.empty(local, hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.parallel.world_size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        embedded = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.parallel.all_reduce(embedded.masked_fill(elsewhere[..., None], 0))

    def load_weight(self, parameter: str, loaded: Tensor, shard: str = "") -> None:
        _expect(loaded, 0, self.vocab_size)
        own = loaded[self.start : self.start + self.weight.shape[0]]
        _copy(self.weight[: own.shape[0]], own)
        self.weight[own.shape[0] :].zero_()


class ParallelLMHead(VocabParallelEmbedding):
    """Projection to the vocabulary, cut as the embedding is; shares its weight where the model ties them."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        place: Placement,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        if tied_to is None:
            super().__init__(vocab_size, hidden_size, place)
            return
        WeightedLayer.__init__(self)
        self.parallel = place.parallel
        self.vocab_size = vocab_size
        self.start = tied_to.start
        self.weight = tied_to.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] to logits [..., vocab_size], whole on every rank."""
        return self.parallel.all_gather(ops.linear(hidden, self.weight))[..., : self.vocab_size]
