"""How layers cut full tensors among ranks: two ranks in one process, their parts put together by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tercet.errors import ConfigError
from tercet.model_source import resolve_model
from tercet.worker_proc.layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    Placement,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tercet.worker_proc.loader import load_model
from tercet.worker_proc.parallel import ParallelContext
from tests.worker_proc.models_harness import save_tiny_checkpoint


class Alone:
    """Collectives that leave each rank with its own part, so that a test can put the parts together."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x


def places(world_size: int) -> list[Placement]:
    ranks = [ParallelContext(rank, world_size, Alone()) for rank in range(world_size)]
    return [Placement(torch.device("cpu"), torch.float32, rank) for rank in ranks]


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_column_parallel_outputs_join() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    outs = []
    for place in places(2):
        layer = ColumnParallelLinear(8, 6, bias=True, place=place)
        layer.load_weight("weight", weight)
        layer.load_weight("bias", bias)
        assert layer.weight.shape == (3, 8)
        outs.append(layer(X))
    torch.testing.assert_close(torch.cat(outs, -1), F.linear(X, weight, bias))


def test_row_parallel_products_add_up_and_bias_counts_once() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    outs = []
    for rank, place in enumerate(places(2)):
        layer = RowParallelLinear(8, 6, bias=True, place=place)
        layer.load_weight("weight", weight)
        layer.load_weight("bias", bias)
        outs.append(layer(X[:, 4 * rank : 4 * rank + 4]) - bias)  # each rank adds it after the reduction
    torch.testing.assert_close(sum(outs) + bias, F.linear(X, weight, bias))


@pytest.mark.parametrize("fused", [False, True])
def test_merged_parts_are_cut_one_by_one(fused: bool) -> None:
    gate, up = torch.randn(6, 8), torch.randn(4, 8)
    outs = []
    for place in places(2):
        layer = MergedColumnParallelLinear(8, (6, 4), ("gate", "up"), bias=False, place=place)
        if fused:
            layer.load_weight("weight", torch.cat((gate, up)))
        else:
            layer.load_weight("weight", up, "up")
            layer.load_weight("weight", gate, "gate")
        outs.append(layer(X).split([3, 2], -1))
    torch.testing.assert_close(torch.cat([out[0] for out in outs], -1), F.linear(X, gate))
    torch.testing.assert_close(torch.cat([out[1] for out in outs], -1), F.linear(X, up))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("num_kv_heads", "world_size"), [(2, 2), (1, 2), (2, 4), (4, 2), (4, 4)])
def test_heads_are_cut_and_kv_heads_copied_where_ranks_outnumber_them(
    num_kv_heads: int, world_size: int, fused: bool
) -> None:
    head_dim, num_heads = 3, 4
    full = {
        name: torch.randn(count * head_dim, 8)
        for name, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
    }
    group = num_heads // num_kv_heads
    for rank, place in enumerate(places(world_size)):
        layer = QKVParallelLinear(8, head_dim, num_heads, num_kv_heads, bias=False, place=place)
        if fused:
            layer.load_weight("weight", torch.cat(list(full.values())))
        else:
            for name, weight in full.items():
                layer.load_weight("weight", weight, name)
        q, k, v = (
            layer(X)
            .unflatten(-1, (-1, head_dim))
            .split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], 1)
        )
        local_group = layer.num_heads // layer.num_kv_heads
        for head in range(layer.num_heads):
            of_all = rank * layer.num_heads + head
            for got, name, index in (
                (q[:, head], "q", of_all),
                (k[:, head // local_group], "k", of_all // group),
            ):
                rows = full[name][index * head_dim : (index + 1) * head_dim]
                torch.testing.assert_close(got, F.linear(X, rows))
            rows = full["v"][of_all // group * head_dim :][:head_dim]
            torch.testing.assert_close(v[:, head // local_group], F.linear(X, rows))


@pytest.mark.parametrize("vocab_size", [10, 11])
def test_vocabulary_is_cut_and_padding_is_dropped(vocab_size: int) -> None:
    weight, ids = torch.randn(vocab_size, 8), torch.arange(vocab_size)
    embedded, logits = [], []
    for place in places(2):
        embedding = VocabParallelEmbedding(vocab_size, 8, place)
        embedding.load_weight("weight", weight)
        head = ParallelLMHead(vocab_size, 8, place, tied_to=embedding)
        assert head.weight is embedding.weight
        embedded.append(embedding(ids))
        logits.append(head(X))
    torch.testing.assert_close(sum(embedded), weight)
    torch.testing.assert_close(torch.cat(logits, -1)[:, :vocab_size], F.linear(X, weight))


def test_uneven_cuts_are_refused() -> None:
    (place, *_) = places(4)
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        ColumnParallelLinear(8, 6, bias=False, place=place)
    with pytest.raises(ConfigError, match="KV heads"):
        QKVParallelLinear(8, 2, 12, 3, bias=False, place=places(2)[0])
    with pytest.raises(ConfigError, match="rank"):
        ParallelContext(2, 2, Alone())
    with pytest.raises(ConfigError, match="communicator"):
        ParallelContext(0, 2)


def test_wrong_shapes_are_refused() -> None:
    (place,) = places(1)
    layer = QKVParallelLinear(8, 4, 2, 1, bias=False, place=place)
    for wrong, shard in ((torch.zeros(7, 8), "q"), (torch.zeros(8, 7), "q"), (torch.zeros(15, 8), "")):
        with pytest.raises(ValueError, match="shape"):
            layer.load_weight("weight", wrong, shard)
    row = RowParallelLinear(8, 6, bias=True, place=place)
    with pytest.raises(ValueError, match="shape"):
        row.load_weight("weight", torch.zeros(6))


def test_two_ranks_hold_the_model_between_them(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    save_tiny_checkpoint(config, tmp_path)
    source = resolve_model(tmp_path)
    whole = load_model(source, device="cpu").state_dict()
    parts = [
        load_model(source, device="cpu", parallel=ParallelContext(rank, 2, Alone())).state_dict()
        for rank in range(2)
    ]
    joined = torch.cat([part["model.layers.0.self_attn.o_proj.weight"] for part in parts], dim=1)
    assert torch.equal(joined, whole["model.layers.0.self_attn.o_proj.weight"])
    heads = torch.cat([part["lm_head.weight"] for part in parts])
    assert torch.equal(heads[:33], whole["lm_head.weight"])
    assert heads.shape[0] == 34
    assert not heads[33:].any()
