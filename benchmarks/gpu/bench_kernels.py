"""Time of each Triton kernel beside its reference and beside the device's ceiling.

    PYTHONPATH=. python benchmarks/gpu/bench_kernels.py --out DIR

Shapes: Qwen3-0.6B (A) and Llama-3.1-8B (B), bfloat16. Each figure is the median time of a replayed CUDA graph that
holds one call for each of several sets of inputs, larger together than the L2 cache, so launches from the host
do not count and nothing is read from the cache. Bytes are those that must move: inputs read once, outputs written
once. The ceilings are measured in the same run: a device copy and a matrix product.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from tercet import ops
from tercet.ops import AttentionMetadata, registry

BF16 = torch.bfloat16
BLOCK_SIZE = 16
SET_BYTES = 150e6  # inputs of all the calls in a graph, at least: three times the L2 cache
MAX_CALLS = 24
UNEVEN = [64 * (1 + 29 * i % 64) for i in range(64)]  # lengths of a batch, in no order


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    qk_norm: bool


A = Shape("A", 1024, 16, 8, 128, 3072, True)
B = Shape("B", 4096, 32, 8, 128, 14336, False)


@dataclass(frozen=True)
class Case:
    """Something to time: the operation, its calls (one for each set of inputs), what one call must do."""

    operation: str
    what: str
    calls: list[Callable[[], Any]]
    bytes: float
    flops: float = 0.0


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def copies(num_bytes: float) -> int:
    return max(1, min(MAX_CALLS, round(SET_BYTES / num_bytes)))


def column(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.as_tensor(values).to("cuda", dtype)


def metadata(decode_lens: list[int], chunks: list[tuple[int, int]]) -> tuple[AttentionMetadata, int]:
    """A step over shuffled blocks, and how many blocks the cache needs."""
    queries = [1] * len(decode_lens) + [query for query, _ in chunks]
    lengths = decode_lens + [length for _, length in chunks]
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    order = torch.randperm(sum(counts)) + 1
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, blocks in enumerate(order.split(counts)):
        table[row, : len(blocks)] = blocks
    ends = torch.tensor(queries).cumsum(0).tolist()
    meta = AttentionMetadata(
        num_decodes=len(decode_lens),
        block_table_BN=table.cuda(),
        seq_lens_B=column(lengths),
        query_start_B1=column([0, *ends]),
        slot_mapping_T=column([0], torch.int64),
        max_query_len=max(queries),
        max_seq_len=max(lengths),
        chunk_query_lens=tuple(query for query, _ in chunks),
        chunk_seq_lens=tuple(length for _, length in chunks),
    )
    return meta, sum(counts) + 1


def attention(
    shape: Shape,
    what: str,
    decode_lens: list[int],
    chunks: list[tuple[int, int]],
    *,
    cache_dtype: torch.dtype = BF16,
    **arguments: Any,
) -> list[Case]:
    """A step's attention; `arguments` go to the operation."""
    meta, num_blocks = metadata(decode_lens, chunks)
    tokens = len(decode_lens) + sum(query for query, _ in chunks)
    positions = sum(decode_lens) + sum(length for _, length in chunks)
    num_bytes = 4.0 * tokens * shape.heads * shape.head_dim
    num_bytes += 2.0 * cache_dtype.itemsize * positions * shape.kv_heads * shape.head_dim
    pairs = sum(decode_lens) + sum(query * (2 * length - query + 1) / 2 for query, length in chunks)
    q = random(tokens, shape.heads, shape.head_dim)
    calls: list[Callable[[], Any]] = []
    scale = shape.head_dim**-0.5
    for _ in range(copies(num_bytes)):
        cache = random(2, num_blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim).to(cache_dtype)
        calls.append(partial(ops.paged_attention, q, cache, meta, scale=scale, **arguments))
    flops = 4.0 * pairs * shape.heads * shape.head_dim
    return [Case("paged_attention", f"{shape.name} {what}", calls, num_bytes, flops)]


def rows(shape: Shape, tokens: int) -> list[Case]:
    """The operations around attention and the feed-forward, for a number of tokens."""
    weight = random(shape.hidden)
    made: dict[str, tuple[float, Callable[[], Callable[[], Any]]]] = {}

    def norm() -> Callable[[], Any]:
        x, residual = random(tokens, shape.hidden), random(tokens, shape.hidden)
        return lambda: ops.add_rms_norm(x, residual, weight, 1e-6)

    def activation() -> Callable[[], Any]:
        x = random(tokens, 2 * shape.intermediate)
        return lambda: ops.silu_and_mul(x)

    def rope() -> Callable[[], Any]:
        qkv = random(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim)
        cos, sin = random(tokens, shape.head_dim), random(tokens, shape.head_dim)
        cache = random(2, tokens // BLOCK_SIZE + 2, BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        slots = column(torch.randperm(tokens) + BLOCK_SIZE, torch.int64)
        norms = (random(shape.head_dim), random(shape.head_dim)) if shape.qk_norm else None
        return lambda: ops.rope_and_write_kv(qkv, cos, sin, cache, slots, qk_norm=norms, eps=1e-6)

    made["add_rms_norm"] = (8.0 * tokens * shape.hidden, norm)
    made["silu_and_mul"] = (6.0 * tokens * shape.intermediate, activation)
    all_heads = shape.heads + 2 * shape.kv_heads
    made["rope_and_write_kv"] = (4.0 * tokens * (all_heads + 1) * shape.head_dim, rope)
    return [
        Case(name, f"{shape.name} {tokens} tokens", [make() for _ in range(copies(num_bytes))], num_bytes)
        for name, (num_bytes, make) in made.items()
    ]


def time_us(calls: list[Callable[[], Any]]) -> float:
    """Median time of one call in a replayed graph, microseconds."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    median: float = triton.testing.do_bench(graph.replay, warmup=10, rep=40, return_mode="median")
    return median * 1e3 / len(calls)


def choose(implementations: str) -> None:
    """Set TERCET_OPS and forget what was chosen before."""
    os.environ["TERCET_OPS"] = implementations
    for operation in registry._operations.values():
        operation.forget_choices()


def measure(case: Case, with_reference: bool) -> dict[str, Any]:
    choose("")
    kernel_us = time_us(case.calls)
    row: dict[str, Any] = {"operation": case.operation, "what": case.what, "us": round(kernel_us, 2)}
    row["TB/s"] = round(case.bytes / kernel_us / 1e6, 3)
    if case.flops:
        row["TFLOP/s"] = round(case.flops / kernel_us / 1e6, 1)
    if with_reference:
        choose("reference")
        row["reference us"] = round(time_us(case.calls[:2]), 2)
    return row


def ceilings() -> dict[str, float]:
    source, target = random(1 << 28), random(1 << 28)
    copy = triton.testing.do_bench(lambda: target.copy_(source), warmup=10, rep=40, return_mode="median")
    a, b = random(8192, 8192), random(8192, 8192)
    product = triton.testing.do_bench(lambda: a @ b, warmup=10, rep=60, return_mode="median")
    return {"copy TB/s": round(2**30 / copy / 1e9, 3), "bf16 TFLOP/s": round(2 * 8192**3 / product / 1e9, 1)}


def cases() -> list[Callable[[], list[Case]]]:
    """Each makes its inputs when it is called, so that only one holds memory at a time."""
    made: list[Callable[[], list[Case]]] = []
    for shape in (A, B):
        for batch, context in (
            (1, 256),
            (1, 8192),
            (16, 1024),
            (64, 256),
            (64, 1024),
            (256, 384),
            (256, 1024),
        ):
            made.append(partial(attention, shape, f"decode {batch} x {context}", [context] * batch, []))
        for count, length in ((1, 128), (1, 4096), (4, 4096), (64, 128)):
            made.append(
                partial(attention, shape, f"prefill {count} x {length}", [], [(length, length)] * count)
            )
        for batch in (64, 256):
            what = f"decode {batch} x 1024, fp8 cache"
            fp8 = torch.float8_e4m3fn
            made.append(partial(attention, shape, what, [1024] * batch, [], cache_dtype=fp8))
        made.append(partial(attention, shape, "decode 64 x 64...4096", UNEVEN, []))
        made.append(partial(attention, shape, "chunk 16 of 8192", [], [(16, 8192)]))
        mixed = [512] * 128, [(1024, 2048)]
        made.append(partial(attention, shape, "mixed 128 x 512 + 1024 of 2048", *mixed))
        for tokens in (1, 64, 256, 8192):
            made.append(partial(rows, shape, tokens))
    return made


def table(out: dict[str, Any]) -> str:
    lines = [
        "| operation | what | µs | TB/s | TFLOP/s | reference, µs |",
        "|---|---|---|---|---|---|",
    ]
    for row in out["kernels"]:
        cells = [row[key] for key in ("operation", "what", "us", "TB/s")]
        cells += [row.get("TFLOP/s", ""), row.get("reference us", "")]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    out: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
        "ceilings": ceilings(),
        "kernels": [],
    }
    print(out["ceilings"], flush=True)
    for make in cases():
        for case in make():
            reference = "4096" not in case.what  # its masks would fill the memory
            out["kernels"].append(measure(case, reference))
            print(json.dumps(out["kernels"][-1]), flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bench_kernels.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")
    print(table(out))


if __name__ == "__main__":
    main()
