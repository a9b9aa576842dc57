"""Steps on the CPU: the plain way, and the reference of `device_steps.py`.

In steady decode the number of Python calls of a step does not depend on the batch.
"""

from __future__ import annotations

import time

import numpy as np
from torch import Tensor

from tercet.ipc.messages import StepPlan
from tercet.worker_proc.device_batch import Chunks, DeviceBatch, IntArray
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.prompt_scoring import ScorePrompts
from tercet.worker_proc.results import PendingResult, read_result
from tercet.worker_proc.sampler import Sampler, SampleResult
from tercet.worker_proc.sampling_state import SampleBatch, SamplingState
from tercet.worker_proc.step_inputs import StepBuilder, StepInputs
from tercet.worker_proc.worker import Deliver


class HostSteps:
    """Runs steps of a batch; a step is done when `run` returns."""

    def __init__(
        self, batch: DeviceBatch, sampling: SamplingState, model: CausalLM, kv_caches: list[Tensor]
    ) -> None:
        self._batch, self._sampling, self._model, self._kv_caches = batch, sampling, model, kv_caches
        self._sampler = Sampler(sampling)
        self._builder = StepBuilder(batch)
        self._sample_batch: SampleBatch | None = None
        self._sample_rows: IntArray = np.zeros(0, np.int32)

    def run(
        self,
        plan: StepPlan,
        chunks: Chunks,
        received_s: float,
        deliver: Deliver,
        score_prompts: ScorePrompts | None,
    ) -> None:
        """Run the step of a plan whose admissions, releases and states are applied already.

        Args:
            score_prompts: gets the hidden states of all tokens and the number of decodes.
        """
        if plan.blocks is not None:
            self._batch.set_blocks(plan.blocks)
        inputs = self._builder.build(chunks, plan.max_len)
        launched_s = time.perf_counter()  # what follows is the device's part, on a GPU
        hidden_TD = self._model.forward(inputs.token_ids_T, inputs.positions_T, self._kv_caches, inputs.meta)
        scores = score_prompts(hidden_TD, inputs.meta.num_decodes) if score_prompts is not None else []
        sampled = self._sample(hidden_TD, inputs) if len(inputs.sample_rows) else None
        pending = PendingResult(
            epoch=plan.epoch,
            step=plan.step,
            rows=inputs.sample_rows,
            gens=self._batch.gen[inputs.sample_rows],
            sampled=sampled,
            frozen=inputs.frozen_S,
            prompt_scores=scores,
            received_s=received_s,
            launched_s=launched_s,
        )
        deliver(read_result(pending))

    def forget(self) -> None:
        """The rows were cleared: nothing here outlives their versions."""

    def close(self) -> None:
        """Everything is delivered already."""

    def _sample(self, hidden_TD: Tensor, inputs: StepInputs) -> SampleResult:
        """Draw tokens and advance the rows that got them."""
        index_S = inputs.sample_index_S
        hidden_SD = hidden_TD if index_S is None else hidden_TD.index_select(0, index_S)
        logits_SV = self._model.compute_logits(hidden_SD)
        batch = self._plan_sampling(inputs.sample_rows)
        result = self._sampler(
            logits_SV, batch, self._batch.history_RM, self._batch.lengths_R, inputs.frozen_S
        )
        self._batch.append(inputs.sample_row_S, result.token_B, result.finish_B, inputs.frozen_S)
        return result

    def _plan_sampling(self, rows: IntArray) -> SampleBatch:
        """The sampler's view of these rows, kept while neither they nor their requests change."""
        known = self._sample_batch
        if known is None or known.version != self._sampling.version or rows is not self._sample_rows:
            self._sample_batch = known = self._sampling.plan(rows)
            self._sample_rows = rows
        return known
