"""Engines with random weights of a shape, started as a user would start them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import Shape
from tercet import LLM, AsyncEngineArgs, AsyncLLM

# max_num_batched_tokens, max_num_seqs: vLLM's own for a large GPU, of `LLM` and of a server.
OFFLINE_LIMITS, SERVING_LIMITS, TINY_LIMITS = (16384, 1024), (8192, 1024), (64, 16)
TINY_CACHE_BYTES = 16 << 20


@dataclass(frozen=True)
class Plan:
    """Which engines to measure.

    Attributes:
        folder: where model folders are made.
        device: as the engine argument of that name.
        tiny: shapes and limits for a CPU.
        tokenizer: folder of S's tokenizer; every other shape, and S without it, has none.
        extra: further engine arguments.
    """

    folder: Path
    device: str = "auto"
    tiny: bool = False
    tokenizer: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, shape: Shape, limits: tuple[int, int]) -> dict[str, Any]:
        """Engine arguments for a shape (the full-size one)."""
        shape = shape.tiny() if self.tiny else shape
        tokens, seqs = TINY_LIMITS if self.tiny else limits
        arguments: dict[str, Any] = {
            "device": self.device,
            "max_num_batched_tokens": tokens,
            "max_num_seqs": seqs,
            "disable_log_stats": True,
        }
        if self.device == "simulated":
            sizes = {"hf_overrides": {"vocab_size": shape.vocab}, "max_model_len": shape.max_len}
            return {**arguments, **sizes, **self.extra}
        folder = shape.write(self.folder / f"{shape.name}{'-tiny' if self.tiny else ''}")
        arguments |= {"model": str(folder), "load_format": "dummy", "dtype": shape.dtype}
        if self.tokenizer and shape.name == "S" and not self.tiny:
            arguments["tokenizer"] = self.tokenizer
        else:
            arguments["skip_tokenizer_init"] = True
        if self.tiny and self.device != "cuda":
            arguments["kv_cache_memory_bytes"] = TINY_CACHE_BYTES
        return {**arguments, **self.extra}


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the engines started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def offline(arguments: Mapping[str, Any]) -> Iterator[tuple[LLM, float]]:
    """An `LLM`, and the seconds from its construction to ready."""
    started = time.perf_counter()
    with LLM(**arguments) as llm:
        yield llm, time.perf_counter() - started


@contextmanager
def serving(arguments: Mapping[str, Any], runner: asyncio.Runner) -> Iterator[tuple[AsyncLLM, float]]:
    """An `AsyncLLM` attached to the runner's event loop, and the seconds to ready."""
    started = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        runner.run(engine.start())
        yield engine, time.perf_counter() - started
    finally:
        runner.run(engine.aclose())


def loop_factory(name: str) -> Any:
    """What makes an event loop: 'asyncio', 'uvloop', or 'auto' for uvloop where it is installed."""
    if name == "asyncio":
        return None
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            raise
        return None
    return uvloop.new_event_loop
