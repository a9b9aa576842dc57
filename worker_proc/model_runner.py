"""Executes plans on a device: changes to the batch, the forward pass, the sampler, the result.

Nothing here waits for the device: sampled tokens stay on it as the next step's input, and leave for the core
through `results.py`. In steady decode the number of Python calls of a step does not depend on the batch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tercet.config import ProcessConfig
from tercet.ipc.messages import KVGroup, StepPlan
from tercet.ops.logprobs import LogprobColumns, compute_prompt_logprobs
from tercet.worker_proc.device_batch import Chunks, DeviceBatch, IntArray
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.results import PendingResult, PromptScores, ResultQueue
from tercet.worker_proc.sampler import Sampler, SampleResult
from tercet.worker_proc.sampling_state import SampleBatch, SamplingState
from tercet.worker_proc.step_inputs import StepBuilder, StepInputs
from tercet.worker_proc.worker import Deliver

_PROMPT_LOGIT_ROWS = 256  # prompt positions scored at a time: bounds the memory of their logits


class ModelRunner:
    """One model on one device, its cache and its batch."""

    def __init__(
        self, config: ProcessConfig, model: CausalLM, kv_caches: list[Tensor], results: ResultQueue
    ) -> None:
        """
        Args:
            kv_caches: per layer [2, num_blocks, block_size, num_kv_heads, head_dim], all finite.
        """
        engine = config.engine
        self.model = model
        self.kv_caches = kv_caches
        self._device = kv_caches[0].device
        self.device = str(self._device)
        self.num_blocks = kv_caches[0].shape[1]
        block_bytes = sum(cache[:, 0].nbytes for cache in kv_caches)
        self.groups = [KVGroup(num_layers=len(kv_caches), block_bytes=block_bytes)]
        num_rows, max_len = engine.scheduler.max_num_seqs, engine.model.max_model_len
        self.batch = DeviceBatch(num_rows, max_len, engine.cache.block_size, self._device)
        self.sampling = SamplingState(num_rows, engine.model.vocab_size, max_len, self._device)
        self._sampler = Sampler(self.sampling)
        self._builder = StepBuilder(self.batch)
        self._results = results
        self._sample_batch: SampleBatch | None = None
        self._sample_rows: IntArray = np.zeros(0, np.int32)
        self._scoring: dict[int, PromptScoring] = {}

    # ------------------------------------------------------------------------------------ Runner

    @torch.inference_mode()
    def execute(self, plan: StepPlan, received_s: float, deliver: Deliver) -> None:
        self._apply(plan)
        chunks = Chunks.of(plan)
        inputs = self._builder.build(chunks, plan.max_len)
        hidden_TD = self.model.forward(inputs.token_ids_T, inputs.positions_T, self.kv_caches, inputs.meta)
        scores = self._score_prompts(hidden_TD, chunks, inputs.meta.num_decodes) if self._scoring else []
        sampled = self._sample(hidden_TD, inputs) if len(inputs.sample_rows) else None
        pending = PendingResult(
            epoch=plan.epoch,
            step=plan.step,
            rows=inputs.sample_rows,
            gens=self.batch.gen[inputs.sample_rows],
            sampled=sampled,
            frozen=inputs.frozen_S,
            prompt_scores=scores,
            received_s=received_s,
            launched_s=time.perf_counter(),
        )
        self._results.put(pending, deliver)

    def clear(self) -> None:
        self.batch.clear()
        self.sampling.clear()
        self._scoring.clear()

    def close(self) -> None:
        self._results.close()

    # ------------------------------------------------------------------------------------ a step

    def _apply(self, plan: StepPlan) -> None:
        """The plan's changes, in the order that the protocol gives."""
        batch = self.batch
        if plan.releases is not None:
            for row in plan.releases.tolist():
                batch.release(row)
                self.sampling.release(row)
                self._scoring.pop(row, None)
        for admission in plan.admissions:
            batch.admit(admission)
            sampling, row = admission.sampling, admission.row
            token_ids = np.array(admission.token_ids, np.int32)
            self.sampling.admit(row, sampling, admission.seed, admission.prompt_len, token_ids)
            if admission.prompt_logprobs_from >= 0 and sampling.prompt_logprobs is not None:
                self._scoring[row] = PromptScoring(
                    admission.prompt_logprobs_from, admission.prompt_len, sampling.prompt_logprobs
                )
        if plan.states is not None:
            batch.set_states(plan.states)
        if plan.blocks is not None:
            batch.set_blocks(plan.blocks)
        if plan.audit is not None:
            batch.audit(plan.audit)

    def _sample(self, hidden_TD: Tensor, inputs: StepInputs) -> SampleResult:
        """Draw tokens and advance the rows that got them."""
        index_S = inputs.sample_index_S
        hidden_SD = hidden_TD if index_S is None else hidden_TD.index_select(0, index_S)
        logits_SV = self.model.compute_logits(hidden_SD)
        batch = self._plan_sampling(inputs.sample_rows)
        result = self._sampler(logits_SV, batch, self.batch.history_RM, self.batch.lengths_R, inputs.frozen_S)
        self.batch.append(inputs.sample_row_S, result.token_B, result.finish_B, inputs.frozen_S)
        return result

    def _plan_sampling(self, rows: IntArray) -> SampleBatch:
        """The sampler's view of these rows, kept while neither they nor their requests change."""
        known = self._sample_batch
        if known is None or known.version != self.sampling.version or rows is not self._sample_rows:
            self._sample_batch = known = self.sampling.plan(rows)
            self._sample_rows = rows
        return known

    def _score_prompts(self, hidden_TD: Tensor, chunks: Chunks, first: int) -> list[PromptScores]:
        """Log-probabilities of prompt tokens whose predecessor is in a chunk."""
        found = []
        columns = zip(chunks.row.tolist(), chunks.start.tolist(), chunks.length.tolist(), strict=True)
        for row, start, length in columns:
            want = self._scoring.get(row)
            if want is not None:
                begin, end = max(start + 1, want.start), min(start + length + 1, want.prompt_len)
                if begin < end:
                    at = first + begin - 1 - start
                    hidden_LD = hidden_TD[at : at + end - begin]
                    found.append(
                        PromptScores(row, begin, self._score(hidden_LD, row, begin, end, want.count))
                    )
            first += length
        return found

    def _score(self, hidden_LD: Tensor, row: int, begin: int, end: int, count: int) -> LogprobColumns:
        target_L = self.batch.history_RM[row, begin:end].long()
        parts = [
            compute_prompt_logprobs(self.model.compute_logits(hidden), target, count)
            for hidden, target in zip(
                hidden_LD.split(_PROMPT_LOGIT_ROWS), target_L.split(_PROMPT_LOGIT_ROWS), strict=True
            )
        ]
        return LogprobColumns(
            token_ids=torch.cat([part.token_ids for part in parts]),
            logprobs=torch.cat([part.logprobs for part in parts]),
            rank=torch.cat([part.rank for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """A row whose prompt's log-probabilities were asked for."""

    start: int  # first position still wanted
    prompt_len: int
    count: int
