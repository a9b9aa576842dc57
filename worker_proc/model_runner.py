"""Executes plans on a device: changes to the batch, then the step.

Nothing here waits for the device: sampled tokens stay on it as the next step's input, and leave for the core behind
the step. How a step runs differs: `host_steps.py` on a CPU, `device_steps.py` on a GPU.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tercet.config import ProcessConfig
from tercet.ipc.messages import KVGroup, StepPlan
from tercet.worker_proc.device_batch import Chunks, DeviceBatch
from tercet.worker_proc.device_results import DeviceResults
from tercet.worker_proc.device_steps import DeviceSteps, OnProgress
from tercet.worker_proc.host_steps import HostSteps
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.patches import Patches
from tercet.worker_proc.prompt_scoring import PromptScoring, ScorePrompts
from tercet.worker_proc.sampler import FusedSampler
from tercet.worker_proc.sampling_state import SamplingState
from tercet.worker_proc.worker import Deliver


class Steps(Protocol):
    """Runs the steps of one batch, in order."""

    def run(
        self,
        plan: StepPlan,
        chunks: Chunks,
        received_s: float,
        deliver: Deliver,
        score_prompts: ScorePrompts | None,
    ) -> None:
        """Run or launch a step; its result goes to `deliver`, now or from another thread."""

    def forget(self) -> None:
        """The rows were cleared."""

    def close(self) -> None:
        """Deliver what is under way, then stop."""


class ModelRunner:
    """One model on one device, its cache and its batch."""

    def __init__(
        self,
        config: ProcessConfig,
        model: CausalLM,
        kv_caches: list[Tensor],
        *,
        use_device_steps: bool | None = None,
    ) -> None:
        """
        Args:
            kv_caches: per layer [2, num_blocks, block_size, num_kv_heads, head_dim], all finite.
            use_device_steps: how steps run; None: as a GPU's on a GPU.
        """
        engine = config.engine
        self.model = model
        self.kv_caches = kv_caches
        device = kv_caches[0].device
        self.device = str(device)
        self.num_blocks = kv_caches[0].shape[1]
        block_bytes = sum(cache[:, 0].nbytes for cache in kv_caches)
        self.groups = [KVGroup(num_layers=len(kv_caches), block_bytes=block_bytes)]
        num_rows, max_len = engine.scheduler.max_num_seqs, engine.model.max_model_len
        patches = Patches(device)
        self.batch = DeviceBatch(num_rows, max_len, engine.cache.block_size, device, patches)
        self.sampling = SamplingState(num_rows, engine.model.vocab_size, max_len, device, patches)
        self._scoring = PromptScoring(model, self.batch.history_RM)
        self._steps: Steps
        self._device_steps: DeviceSteps | None = None
        if device.type == "cuda" if use_device_steps is None else use_device_steps:
            self._steps = self._device_steps = DeviceSteps(
                self.batch,
                patches,
                FusedSampler(self.sampling, model.spec.logit_soft_cap),
                model,
                kv_caches,
                DeviceResults(device),
                max_tokens=engine.scheduler.max_num_batched_tokens,
                use_graphs=device.type == "cuda" and not engine.worker.enforce_eager,
            )
        else:
            self._steps = HostSteps(self.batch, self.sampling, model, kv_caches)

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile what a GPU's steps launch, then close: a runner over the smallest cache will do."""
        if self._device_steps is not None:
            self._device_steps.compile()
        self.close()

    @torch.inference_mode()
    def warm_up(self, progress: OnProgress) -> None:
        """Capture graphs, so that no step pays for it."""
        if self._device_steps is not None:
            self._device_steps.capture(progress)

    # ------------------------------------------------------------------------------------ Runner

    @torch.inference_mode()
    def execute(self, plan: StepPlan, received_s: float, deliver: Deliver) -> None:
        self._apply(plan)
        chunks = Chunks.of(plan)
        self._steps.run(plan, chunks, received_s, deliver, self._scoring.for_step(chunks))
        if plan.audit is not None:
            self.batch.audit(plan.audit)

    def clear(self) -> None:
        self.batch.clear()
        self.sampling.clear()
        self._scoring.clear()
        self._steps.forget()

    def close(self) -> None:
        self._steps.close()

    # ------------------------------------------------------------------------------------ a step

    def _apply(self, plan: StepPlan) -> None:
        """The plan's changes, in the order that the protocol gives. The step itself changes blocks."""
        batch = self.batch
        if plan.releases is not None:
            for row in plan.releases.tolist():
                batch.release(row)
                self.sampling.release(row)
                self._scoring.release(row)
        for admission in plan.admissions:
            batch.admit(admission)
            token_ids = np.array(admission.token_ids, np.int32)
            self.sampling.admit(
                admission.row, admission.sampling, admission.seed, admission.prompt_len, token_ids
            )
            self._scoring.admit(admission)
        if plan.states is not None:
            batch.set_states(plan.states)
