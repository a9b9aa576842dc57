"""Checks the attention kernel on a GPU, then times tiles for the shapes of `bench_kernels.py`.

    PYTHONPATH=. python benchmarks/gpu/tune_attention.py --out DIR [--no-cases] [--minutes 4]

Cases (`tests/ops/triton_attention_cases.py`) and compilations run in several processes at once; times are medians
over replays of a CUDA graph, alone on the device. A variant that fails or differs from the shipped tiles is
reported and left out. Also timed: counts on the device against numbers on the host, batch-invariant mode, and a
chain of row kernels and attention with and without programmatic dependent launches. Writes tune_attention.json to
DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/tercet-tune-attention")

import torch
from torch import Tensor

from benchmarks.gpu.bench_kernels import BF16, BLOCK_SIZE, UNEVEN, A, B, Shape, attention, column, random
from benchmarks.gpu.linear_timing import calls_us, capture, replay_us
from tercet import ops
from tercet.ops import AttentionMetadata, invariance, triton_attention
from tercet.ops.triton_attention import Tiles, decode_tiles, prefill_tiles
from tercet.ops.triton_support import set_programmatic_launch

CASES = "tests/ops/triton_attention_cases.py"
PROCESSES = 12
MAX_ERROR = 1e-2  # bfloat16 rounds to 2**-9; the shipped tiles round elsewhere
CAPTURED_BLOCKS = 2048  # width of the block table of a captured step: a model's longest context
CHAIN_LAYERS = 28

# m, n, warps, stages, programs of a processor, least tiles of a split
DECODE = {
    "64 w4 s3 p4": Tiles(16, 64, 4, 3, 4, 1),
    "64 w4 s3 p2": Tiles(16, 64, 4, 3, 2, 1),
    "64 w4 s3 p8": Tiles(16, 64, 4, 3, 8, 1),
    "64 w4 s3 p4 least 4": Tiles(16, 64, 4, 3, 4, 4),
    "64 w4 s5 p2": Tiles(16, 64, 4, 5, 2, 1),
    "64 w4 s5 p3": Tiles(16, 64, 4, 5, 3, 1),
    "128 w4 s3 p2": Tiles(16, 128, 4, 3, 2, 1),
    "128 w8 s3 p2": Tiles(16, 128, 8, 3, 2, 1),
    "32 w2 s5 p8": Tiles(16, 32, 2, 5, 8, 1),
}
PREFILL = {
    "128x64 w8 s3": Tiles(128, 64, 8, 3, 2, 4),
    "128x64 w8 s3 r128": Tiles(128, 64, 8, 3, 2, 4, max_registers=128),
    "128x32 w4 s3": Tiles(128, 32, 4, 3, 2, 8),
    "128x64 w4 s3": Tiles(128, 64, 4, 3, 2, 4),
    "128x64 w4 s2": Tiles(128, 64, 4, 2, 2, 4),
    "128x32 w8 s3 r128": Tiles(128, 32, 8, 3, 2, 8, max_registers=128),
    "128x128 w8 s3": Tiles(128, 128, 8, 3, 1, 2),
    "64x64 w4 s3": Tiles(64, 64, 4, 3, 2, 4),
    "64x64 w4 s3 least 1": Tiles(64, 64, 4, 3, 2, 1),
}
FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Work:
    """A step to time: its decodes' context lengths, its chunks' query and context lengths."""

    shape: Shape
    what: str
    decode_lens: list[int]
    chunks: list[tuple[int, int]]
    cache_dtype: torch.dtype = BF16

    @property
    def variants(self) -> dict[str, dict[str, Tiles]]:
        """Name -> arguments that choose tiles."""
        if self.chunks:
            return {name: {"prefill": tiles} for name, tiles in PREFILL.items()}
        return {name: {"decode": tiles} for name, tiles in DECODE.items()}

    @property
    def shipped(self) -> str:
        """The tiles that the tables hold."""
        group, head_dim = self.shape.heads // self.shape.kv_heads, self.shape.head_dim
        if not self.chunks:
            return _name(DECODE, decode_tiles(head_dim, group, BF16, self.cache_dtype, len(self.decode_lens)))
        longest = max(query for query, _ in self.chunks)
        return _name(PREFILL, prefill_tiles(head_dim, group, BF16, longest))

    def small(self) -> Work:
        """As many sequences, but short: compiles to the same binaries."""
        decode_lens, chunks = [64 for _ in self.decode_lens], [(17, 64) for _ in self.chunks]
        return dataclasses.replace(self, decode_lens=decode_lens, chunks=chunks)

    def calls(self, **arguments: Any) -> list[partial[Tensor]]:
        """Calls of the kernel over sets of inputs larger than the L2 cache."""
        (case,) = attention(
            self.shape, self.what, self.decode_lens, self.chunks, cache_dtype=self.cache_dtype
        )
        calls = [call for call in case.calls if isinstance(call, partial)]
        kernel: Any = triton_attention.paged_attention
        return [partial(kernel, *call.args, **call.keywords, **arguments) for call in calls]


def _name(tiles: dict[str, Tiles], wanted: Tiles) -> str:
    return next((name for name, item in tiles.items() if item == wanted), str(wanted))


def works() -> list[Work]:
    """Most telling first: time may run out."""
    made: list[Work] = []
    for batch, context in ((1, 256), (256, 1024), (16, 1024), (64, 256), (1, 8192), (64, 1024), (256, 384)):
        made.append(Work(A, f"decode {batch} x {context}", [context] * batch, []))
    made.append(Work(A, "decode 64 uneven", UNEVEN, []))
    for count, query, length in (
        (4, 4096, 4096), (1, 512, 512), (1, 128, 128), (64, 128, 128), (1, 4096, 4096), (1, 16, 8192), (1, 1024, 2048),
    ):  # fmt: skip
        made.append(Work(A, f"{count} x {query} of {length}", [], [(query, length)] * count))
    made += [
        Work(A, "decode 64 x 1024, fp8", [1024] * 64, [], FP8),
        Work(A, "decode 256 x 1024, fp8", [1024] * 256, [], FP8),
        Work(B, "decode 1 x 256", [256], []),
        Work(B, "decode 256 x 1024", [1024] * 256, []),
        Work(B, "4 x 4096 of 4096", [], [(4096, 4096)] * 4),
        Work(B, "1 x 512 of 512", [], [(512, 512)]),
    ]
    return made


# ------------------------------------------------------------------------------------------ cases


def run_cases() -> str:
    """Run the GPU cases, spread over processes; returns what pytest says of failures, or a count."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run([*pytest, "--collect-only", CASES], capture_output=True, text=True, check=False)
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    if not names:
        return f"no cases were found: {listed.stdout[-2000:]} {listed.stderr[-2000:]}"
    running = [
        subprocess.Popen([*pytest, *names[i::PROCESSES]], stdout=subprocess.PIPE, text=True)
        for i in range(min(PROCESSES, len(names)))
    ]
    outputs = [process.communicate()[0] for process in running]
    failed = [
        output[-3000:]
        for process, output in zip(running, outputs, strict=True)
        if process.returncode not in (0, 5)
    ]
    return "\n".join(failed) if failed else f"all of {len(names)} cases passed"


# ---------------------------------------------------------------------------------------- compiling


def compile_variant(work: Work, arguments: dict[str, Tiles]) -> None:
    """Run a variant once on little memory, so that its binary is in the cache."""
    work.small().calls(**arguments)[0]()
    torch.cuda.synchronize()


def variants_to_compile(chosen: list[Work]) -> list[partial[None]]:
    """One task for each binary."""
    tasks: dict[object, partial[None]] = {}
    for work in chosen:
        rows = triton_attention.padded_rows(max(len(work.decode_lens), len(work.chunks)))
        for arguments in work.variants.values():
            (tiles,) = arguments.values()
            compiled = dataclasses.replace(tiles, per_processor=1)
            key = (work.shape.heads, work.cache_dtype, rows, *arguments, compiled)
            tasks.setdefault(key, partial(compile_variant, work, arguments))
    return list(tasks.values())


def compile_modes(work: Work) -> None:
    """The same for `time_modes`."""
    call = work.small().calls()[0]
    counted(call)()
    invariance.set_batch_invariant(True)
    try:
        call()
    finally:
        invariance.set_batch_invariant(False)
    torch.cuda.synchronize()


def compile_all(tasks: list[partial[None]]) -> None:
    """Compile in several processes; failures show again when the variant is timed."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.exception()


# ------------------------------------------------------------------------------------------- timing


def time_work(work: Work) -> dict[str, Any]:
    """Microseconds of each variant that gives what the shipped tiles give."""
    calls = work.calls()
    expected = calls[0]().float()
    times: dict[str, float] = {}
    rejected: dict[str, str] = {}
    for name, arguments in work.variants.items():
        try:
            error = float((calls[0](**arguments).float() - expected).norm() / expected.norm())
            if not error < MAX_ERROR:
                raise ArithmeticError(f"relative error {error}")
            times[name] = round(calls_us([partial(call, **arguments) for call in calls]), 2)
        except Exception as failure:  # the other variants are still worth having
            rejected[name] = f"{type(failure).__name__}: {failure}"[:200]
            if isinstance(failure, torch.AcceleratorError):
                raise
    return {
        "what": f"{work.shape.name} {work.what}",
        "shipped": work.shipped,
        "us": dict(sorted(times.items(), key=lambda item: item[1])),
        "rejected": rejected,
    }


def captured(meta: AttentionMetadata) -> AttentionMetadata:
    """The step as a graph holds it: counts on the device, a table of full width."""
    table = meta.block_table_BN
    wide = torch.zeros(table.shape[0], CAPTURED_BLOCKS, dtype=torch.int32, device=table.device)
    wide[:, : table.shape[1]] = table
    return dataclasses.replace(
        meta,
        block_table_BN=wide,
        max_seq_len=CAPTURED_BLOCKS * BLOCK_SIZE,
        max_query_len=max(meta.max_query_len, 1),
        counts=column([meta.num_decodes, len(meta.chunk_query_lens)]),
        num_chunks=len(meta.chunk_query_lens),
        num_chunk_tokens=sum(meta.chunk_query_lens),
        chunk_query_lens=(),
        chunk_seq_lens=(),
        memo={},
    )


def counted(call: partial[Tensor]) -> partial[Tensor]:
    """The call as a graph holds it."""
    return partial(call.func, *call.args[:2], captured(call.args[2]), **call.keywords)


def time_modes(work: Work) -> dict[str, Any]:
    """Microseconds with the shipped tiles as they are, with counts on the device, and batch-invariant."""
    calls = work.calls()
    row: dict[str, Any] = {
        "what": f"{work.shape.name} {work.what}",
        "host us": round(calls_us(list(calls)), 2),
    }
    bounded = [counted(call) for call in calls]
    expected = calls[0]()
    row["counted is equal"] = bool(
        (bounded[0]() - expected).float().norm() < MAX_ERROR * expected.float().norm()
    )
    row["counted us"] = round(calls_us(list(bounded)), 2)
    invariance.set_batch_invariant(True)
    try:
        row["invariant us"] = round(calls_us(list(calls)), 2)
    finally:
        invariance.set_batch_invariant(False)
    return row


def time_chain(shape: Shape, batch: int, context: int) -> dict[str, Any]:
    """Microseconds of the kernels of some layers without their matrix products, as one graph."""
    (call, *_) = Work(shape, "", [context] * batch, []).calls()
    cache, meta = call.args[1], call.args[2]
    scale = float(call.keywords["scale"])
    x, residual, weight = random(batch, shape.hidden), random(batch, shape.hidden), random(shape.hidden)
    qkv = random(batch, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    cos, sin = random(batch, shape.head_dim), random(batch, shape.head_dim)
    slots = torch.arange(batch, device="cuda") % BLOCK_SIZE  # of the null block: the cache stays as it is
    gate_up = random(batch, 2 * shape.intermediate)

    def step() -> Tensor:
        out = x
        for _ in range(CHAIN_LAYERS):
            ops.add_rms_norm(x, residual, weight, 1e-6)
            q = ops.rope_and_write_kv(qkv, cos, sin, cache, slots, eps=1e-6)
            out = ops.paged_attention(q, cache, meta, scale=scale)
            ops.add_rms_norm(x, residual, weight, 1e-6)
            ops.silu_and_mul(gate_up)
        return out

    row: dict[str, Any] = {"what": f"{shape.name} chain of {CHAIN_LAYERS} layers, {batch} x {context}"}
    outputs = []
    for name, on in (("plain us", False), ("PDL us", True)):
        set_programmatic_launch(on)
        graph = capture(lambda: outputs.append(step()))
        row[name] = round(replay_us(graph), 1)
    row["same bits"] = torch.equal(outputs[-1], outputs[-3])
    return row


# --------------------------------------------------------------------------------------------- main


def table(out: dict[str, Any]) -> str:
    """Each step's best variants beside the shipped one."""
    lines = []
    for row in out["variants"]:
        best = ", ".join(f"{name} {us}" for name, us in list(row["us"].items())[:4])
        lines.append(
            f"{row['what']}: shipped ({row['shipped']}) {row['us'].get(row['shipped'])}; best: {best}"
        )
        lines += [f"  rejected {name}: {why}" for name, why in row["rejected"].items()]
    lines += [json.dumps(row) for row in out["modes"]]
    return "\n".join(lines)


def measure(out: dict[str, Any], begin: float, deadline: float) -> None:
    """Fill `out` as far as time allows."""
    chosen = works()
    shown = [
        work for work in chosen if work.what in ("decode 1 x 256", "decode 64 x 256", "decode 256 x 1024")
    ]
    shown += [
        work for work in chosen if work.what in ("1 x 512 of 512", "4 x 4096 of 4096", "1 x 16 of 8192")
    ]
    tasks = [partial(compile_modes, work) for work in shown if work.shape is A]
    compile_all([*tasks, *variants_to_compile(chosen)])
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    timings: list[tuple[str, Any]] = [("variants", partial(time_work, work)) for work in chosen[:10]]
    timings += [("modes", partial(time_chain, A, 1, 256)), ("modes", partial(time_chain, A, 256, 384))]
    timings += [("modes", partial(time_modes, work)) for work in shown if work.shape is A]
    timings += [("variants", partial(time_work, work)) for work in chosen[10:]]
    for key, timing in timings:
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            return
        try:
            out[key].append(timing())
        except torch.AcceleratorError:
            raise  # nothing works on this device from here on
        except Exception as failure:
            print(f"{key}: {type(failure).__name__}: {failure}"[:500], flush=True)
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--no-cases", action="store_true", help="time only")
    parser.add_argument(
        "--minutes", type=float, default=3.8, help="stop after so many (default: %(default)s)"
    )
    args = parser.parse_args()
    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    out: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "variants": [], "modes": []}
    out["cases"] = "not run" if args.no_cases else run_cases()
    print(f"{out['cases']} ({time.monotonic() - begin:.0f} s)", flush=True)
    try:
        measure(out, begin, begin + 60 * args.minutes)
    finally:
        (args.out / "tune_attention.json").write_text(json.dumps(out, indent=1) + "\n")
        print(table(out))


if __name__ == "__main__":
    main()
