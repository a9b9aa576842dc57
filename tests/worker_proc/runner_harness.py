"""A scheduler and a real model runner in one process, on a tiny Llama with random weights: no sockets."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any

import torch

from tercet.config import EngineArgs, ProcessConfig
from tercet.core_proc.results import apply_result
from tercet.core_proc.scheduler import Scheduler
from tercet.ipc.messages import AddRequest, StepOutputs, StepPlan, StepResult
from tercet.model_source import resolve_model
from tercet.worker_proc import kv_memory
from tercet.worker_proc.loader import load_model
from tercet.worker_proc.model_runner import ModelRunner

VOCAB_SIZE = 512
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}


class RunnerEngine:
    """Steps a scheduler and a model runner by hand."""

    def __init__(
        self, folder: Path, *, num_blocks: int = 512, use_device_steps: bool = False, **args: Any
    ) -> None:
        (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
        settings: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 256, "audit": True, **args}
        config = EngineArgs(
            model=str(folder),
            load_format="dummy",
            device="cpu",
            num_gpu_blocks_override=num_blocks,
            **settings,
        ).create_engine_config()
        self.config = config
        torch.set_num_threads(1)
        model = load_model(resolve_model(str(folder)), device="cpu", load_format="dummy")
        cache_dtype = kv_memory.cache_dtype(config, torch.float32)
        caches = kv_memory.allocate(config, model, num_blocks, cache_dtype)
        process = ProcessConfig(
            engine=config, worker_address="", frontend_address="", runtime_dir="", epoch=1
        )
        self.runner = ModelRunner(process, model, caches, use_device_steps=use_device_steps)
        self.scheduler = Scheduler(
            config.scheduler,
            num_blocks=num_blocks,
            block_size=config.cache.block_size,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
        self.in_flight: deque[StepResult] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.finish: dict[int, int] = {}
        self.outputs: list[StepOutputs] = []
        self.failed: dict[int, str] = {}

    def add(self, message: AddRequest) -> None:
        for child in range(len(message.seeds)):
            self.tokens[message.handle + child] = message.token_ids[message.prompt_len :].tolist()
        self.scheduler.add(1, message, 0.0)

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule(0.0)
        if plan is not None:
            self.runner.execute(plan, 0.0, self.in_flight.append)
        return plan

    def land(self) -> None:
        outgoing = apply_result(self.scheduler, self.in_flight.popleft(), 0.0)
        for _, failure in outgoing.failures:
            self.failed[failure.handle] = failure.message
        for _, message in outgoing.outputs:
            self.outputs.append(message)
            columns = (message.handle, message.first_index, message.token, message.finish)
            for handle, index, token, finish in zip(*(c.tolist() for c in columns), strict=True):
                assert index == len(self.tokens[handle])
                self.tokens[handle].append(token)
                self.finish[handle] = finish

    def run(self, depth: int = 2) -> dict[int, list[int]]:
        """Until every request is finished, with `depth` steps in flight."""
        while self.scheduler.has_unfinished() or self.in_flight:
            if self.in_flight:
                self.land()
            while len(self.in_flight) < depth and self.launch() is not None:
                pass
            self.scheduler.check_invariants()
        return self.tokens
