"""From a configuration to a runner that is ready: device, weights, cache."""

from __future__ import annotations

import json
import sys
import time

import psutil
import torch

from tercet.config import ProcessConfig
from tercet.ipc.child import ChildProcess, Progress
from tercet.log import get_logger
from tercet.model_source import resolve_model
from tercet.ops.invariance import set_batch_invariant
from tercet.worker_proc import kv_memory
from tercet.worker_proc.loader import load_model
from tercet.worker_proc.model_runner import ModelRunner

logger = get_logger(__name__)

_SWITCH_INTERVAL_S = 0.0002  # the results thread must not wait 5 ms for the launching one


def make_runner(config: ProcessConfig, child: ChildProcess) -> ModelRunner:
    """Load the model and size its cache, reporting progress."""
    stages = Stages()
    stages.enter("device")
    engine = config.engine
    torch.set_num_threads(engine.worker.num_threads)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    device = torch.device(engine.worker.device, 0) if engine.worker.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    stages.enter("weights")
    source = resolve_model(engine.model.path, revision=engine.model.revision)
    source.config.clear()
    source.config.update(json.loads(engine.model.hf_config))  # with the user's overrides
    model = load_model(
        source,
        device=str(device),
        dtype=engine.model.dtype,
        load_format=engine.model.load_format,  # type: ignore[arg-type]
        max_model_len=engine.model.max_model_len,
        progress=_reporter(child),
    )
    set_batch_invariant(engine.worker.batch_invariant)
    model_dtype = next(model.parameters()).dtype
    dtype = kv_memory.cache_dtype(engine, model_dtype)
    if device.type == "cuda":
        stages.enter("compilation")
        child.report(Progress("compiling kernels"))
        ModelRunner(config, model, kv_memory.allocate(engine, model, 2, dtype)).compile()
    child.report(Progress("sizing the KV cache"))
    stages.enter("KV cache")
    num_blocks = kv_memory.count_blocks(engine, model, dtype)
    caches = kv_memory.allocate(engine, model, num_blocks, dtype)
    gib = num_blocks * kv_memory.block_bytes(engine, model, dtype) / 2**30
    logger.info(
        "%s in %s on %s, KV cache %.2f GiB of %s", engine.model.architecture, model_dtype, device, gib, dtype
    )
    runner = ModelRunner(config, model, caches)
    stages.enter("graphs")
    runner.warm_up(lambda done, total: child.report(Progress("capturing graphs", done, total)))
    logger.info("ready after %s", stages)
    return runner


class Stages:
    """How long each stage of the start took, the interpreter's and the imports' included."""

    def __init__(self) -> None:
        self._begin = psutil.Process().create_time()
        self._seconds: list[tuple[str, float]] = []
        self._stage = "import"

    def enter(self, stage: str) -> None:
        """The stage before is over."""
        now = time.time()
        self._seconds.append((self._stage, now - self._begin))
        self._begin, self._stage = now, stage

    def __str__(self) -> str:
        self.enter("")
        return ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self._seconds)


def _reporter(child: ChildProcess):  # type: ignore[no-untyped-def]
    """Progress of loading, in whole percents: a report per tensor would be noise."""
    last = -1

    def report(done: int, total: int) -> None:
        nonlocal last
        percent = 100 * done // max(total, 1)
        if percent != last:
            last = percent
            child.report(Progress("loading weights", done, total))

    return report
