"""Steps on a GPU: one small copy to it, two graphs, one small copy back, and never a wait.

A step's buffer says which rows run and which blocks changed (`ops.step_state`); the first graph looks the rest up
and runs the model, the second draws tokens and advances the rows. Steps too large to be captured, and those whose
hidden states or logits are looked at on the way, launch the same operations one by one. On a CPU the operations'
references run, which is how this is tested without a GPU.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tercet.ipc.messages import StepPlan
from tercet.ops import AttentionMetadata
from tercet.ops.launch import compiling
from tercet.ops.logprobs import gather_logprobs
from tercet.ops.sample_rows import Variant
from tercet.ops.step_state import (
    HEADER_SIZE,
    NUM_CHANGES,
    NUM_CHUNKS,
    NUM_DECODES,
    NUM_SAMPLES,
    NUM_TOKENS,
    RowTensors,
    StepBuffer,
    StepTensors,
    prepare_step,
)
from tercet.worker_proc import graphs
from tercet.worker_proc.device_batch import Chunks, DeviceBatch, IntArray
from tercet.worker_proc.device_results import DeviceResults, Landing
from tercet.worker_proc.graphs import GraphCache
from tercet.worker_proc.models.decoder import CausalLM
from tercet.worker_proc.patches import Patches
from tercet.worker_proc.prompt_scoring import ScorePrompts
from tercet.worker_proc.results import PendingResult, PromptScores, columns_to_host
from tercet.worker_proc.sampler import DrawPlan, FusedSampler, LogprobTensors, SampleResult
from tercet.worker_proc.sampling_state import LogprobRows
from tercet.worker_proc.worker import Deliver

OnProgress = Callable[[int, int], None]
_EMPTY = np.zeros(0, np.int32)
_COMPILER_THREADS = 16


@dataclass(frozen=True, slots=True)
class StepBounds:
    """Upper bounds of a step's counts: all that is fixed when it is captured.

    Attributes:
        tokens: with padding.
        decodes, chunks, samples: at most so many of each.
        query_len: no chunk has more tokens.
    """

    tokens: int
    decodes: int
    chunks: int
    samples: int
    query_len: int


@dataclass(frozen=True, slots=True)
class _Counts:
    decodes: int
    chunks: int
    tokens: int

    @staticmethod
    def of(num_decodes: int, chunks: Chunks) -> _Counts:
        return _Counts(num_decodes, len(chunks.row), num_decodes + int(chunks.length.sum()))


class DeviceSteps:
    """Runs steps of a batch on one device. All methods run on the worker's launching thread.

    Args:
        patches: holds the batch's and the sampler's writes of admissions, sent before each step.
        max_tokens: most tokens of a step.
        use_graphs: whether steps are captured; needs a GPU.
    """

    def __init__(
        self,
        batch: DeviceBatch,
        patches: Patches,
        sampler: FusedSampler,
        model: CausalLM,
        kv_caches: list[Tensor],
        results: DeviceResults,
        *,
        max_tokens: int,
        use_graphs: bool,
    ) -> None:
        self._batch, self._sampler, self._model, self._kv_caches = batch, sampler, model, kv_caches
        self._patches, self._results = patches, results
        self._use_graphs = use_graphs
        self._graphs = GraphCache(batch.device)
        num_rows = batch.num_rows
        self._batch_sizes = graphs.batch_sizes(num_rows)
        self._mixed_sizes = graphs.mixed_sizes(min(max_tokens, graphs.MAX_MIXED_TOKENS))
        max_changes = num_rows + -(-max_tokens // batch.block_size)
        self._layout = StepBuffer(num_rows, max_changes)
        self._buffer = torch.zeros(self._layout.size, dtype=torch.int32, device=batch.device)
        self._counts = self._buffer[NUM_DECODES : NUM_CHUNKS + 1]
        query_start = self._layout.query_start
        self._query_start_B1 = self._buffer[query_start : query_start + num_rows + 1]
        self._rows = RowTensors(batch.history_RM, batch.lengths_R, batch.finished_R, batch.block_table_RN)
        self._out_4S = torch.zeros((4, num_rows), dtype=torch.int32, device=batch.device)
        self._step = _step_tensors(batch, max(max_tokens, num_rows), self._out_4S[3])
        weight = next(model.parameters())
        self._hidden_SD = torch.zeros(
            (num_rows, model.spec.hidden_size), dtype=weight.dtype, device=batch.device
        )
        self._sent_version = -1  # of the decoding rows, in the buffer on the device
        self._decode_rows: IntArray = _EMPTY
        self._planned_rows: IntArray | None = None
        self._planned_version = -1
        self._draw = DrawPlan(Variant.GREEDY, None)
        results.prepare(self._layout.size, num_rows)

    # ------------------------------------------------------------------------------------ a step

    def run(
        self,
        plan: StepPlan,
        chunks: Chunks,
        received_s: float,
        deliver: Deliver,
        score_prompts: ScorePrompts | None,
    ) -> None:
        """Launch the step of a plan whose admissions, releases and states are applied already.

        Args:
            score_prompts: gets the hidden states of all tokens and the number of decodes; the step is not
                captured then.
        """
        landing = self._results.next_landing()
        count = _Counts.of(self._batch.decoding.count, chunks)
        is_steady = not count.chunks and self._batch.decoding.version == self._sent_version
        rows = self._decode_rows if is_steady else self._write_rows(landing.buffer, chunks, count.decodes)
        self._plan_sampling(rows)
        self._patches.flush()
        self._send(landing, plan, count, len(rows), is_steady)
        scores: list[PromptScores] = []
        if score_prompts is not None:
            hidden_TD = self._forward(self._exact(chunks, count, len(rows)))
            scores = score_prompts(hidden_TD, count.decodes)
        elif count.tokens:
            self._launch_forward(chunks, count, len(rows))
        sampled = self._launch_sampling(landing, len(rows)) if len(rows) else None
        pending = PendingResult(
            epoch=plan.epoch,
            step=plan.step,
            rows=rows,
            gens=self._batch.gen[rows],
            sampled=sampled,
            frozen=landing.frozen(len(rows)),
            prompt_scores=scores,
            received_s=received_s,
            launched_s=time.perf_counter(),
        )
        self._results.put(landing, pending, deliver)

    def compile(self) -> None:
        """Compile the kernels that steps launch, many at a time."""
        self._buffer[:HEADER_SIZE].zero_()
        with compiling(min(os.cpu_count() or 1, _COMPILER_THREADS)):
            for bounds in [*self._forward_bounds(), *self._large_bounds()]:
                self._forward(bounds)
            for variant, size in self._draws():
                self._sample(variant, size)
        torch.cuda.synchronize(self._batch.device)

    def capture(self, progress: OnProgress) -> None:
        """Capture the graphs, the largest first: the others then fit its memory."""
        if not self._use_graphs:
            return
        forwards, draws = self._forward_bounds(), self._draws()
        total = len(forwards) + len(draws)
        for done, bounds in enumerate(forwards):
            progress(done, total)
            self._capture_forward(bounds)
        for done, (variant, size) in enumerate(draws, start=len(forwards)):
            progress(done, total)
            self._capture_draw(variant, size)
        progress(total, total)

    def _forward_bounds(self) -> list[StepBounds]:
        """Of the forward passes that are captured."""
        made = [self._decode_bounds(size) for size in self._batch_sizes]
        made += [self._mixed_bounds(size) for size in self._mixed_sizes]
        return sorted(made, key=lambda bounds: -bounds.tokens)

    def _draws(self) -> list[tuple[Variant, int]]:
        """Those that are captured at the start; others are when they are first needed."""
        variants = (Variant.GREEDY, Variant.TEMPERATURE)
        return [(variant, size) for size in reversed(self._batch_sizes) for variant in variants]

    def _large_bounds(self) -> list[StepBounds]:
        """Of steps that are launched one by one, one for each kind of kernel that they may need."""
        tokens = min(len(self._step.token_ids_T), graphs.MAX_MIXED_TOKENS + 1)
        most = min(tokens, self._batch.num_rows)
        decodes = [StepBounds(tokens, min(count, most), 0, 1, 1) for count in (1, 8, 32, 256, most)]
        chunks = [
            StepBounds(tokens, 0, min(count, most), 1, query_len)
            for count in (1, 32, 256, most)
            for query_len in (tokens // 8, tokens)
        ]
        return decodes + chunks

    def close(self) -> None:
        """Deliver what is under way, then stop."""
        self._results.close()

    def forget(self) -> None:
        """The rows were cleared."""
        self._sent_version = -1
        self._planned_rows = None

    # ------------------------------------------------------------------------------------ the buffer

    def _send(
        self, landing: Landing, plan: StepPlan, count: _Counts, num_samples: int, is_steady: bool
    ) -> None:
        """Complete the step's buffer and copy as much of it as changed."""
        host = landing.buffer
        num_changes = self._write_changes(host, plan)
        host[NUM_DECODES], host[NUM_CHUNKS] = count.decodes, count.chunks
        host[NUM_TOKENS], host[NUM_SAMPLES], host[NUM_CHANGES] = count.tokens, num_samples, num_changes
        size = self._layout.changes + 3 * num_changes if is_steady else self._layout.size
        self._buffer[:size].copy_(landing.buffer_tensor[:size], non_blocking=True)
        if num_changes and not count.tokens:
            raise RuntimeError("a plan changes blocks and runs nothing")

    def _write_rows(self, host: IntArray, chunks: Chunks, num_decodes: int) -> IntArray:
        """The parts of the buffer that differ only when rows come or go, or have chunks; the rows that sample."""
        layout, num_chunks = self._layout, len(chunks.row)
        decode_rows = self._batch.decoding.snapshot()
        ends = num_decodes + np.cumsum(chunks.length)
        sampling = np.flatnonzero(chunks.sample)
        rows = np.concatenate((decode_rows, chunks.row[sampling])).astype(np.int32)
        first_chunk = layout.seq_start + num_decodes
        _put(host, layout.seq_row, decode_rows, chunks.row)
        host[first_chunk : first_chunk + num_chunks] = chunks.start
        _put(host, layout.query_start, np.arange(num_decodes + 1), ends)
        _put(host, layout.sample_token, np.arange(num_decodes), ends[sampling] - 1)
        _put(host, layout.sample_row, rows)
        # With chunks in the buffer, the next step must write it anew.
        self._sent_version = -1 if num_chunks else self._batch.decoding.version
        self._decode_rows = rows
        return rows

    def _write_changes(self, host: IntArray, plan: StepPlan) -> int:
        if plan.blocks is None:
            return 0
        count = len(plan.blocks)
        if count > self._layout.max_changes:
            raise RuntimeError(f"{count} block changes in one step, room for {self._layout.max_changes}")
        start = self._layout.changes
        host[start : start + 3 * count] = plan.blocks[:, 1:].ravel()
        return count

    # ------------------------------------------------------------------------------------ the forward pass

    def _launch_forward(self, chunks: Chunks, count: _Counts, num_samples: int) -> None:
        bounds = self._captured_bounds(count)
        if bounds is None:
            self._forward(self._exact(chunks, count, num_samples))
        else:
            self._graphs.replay(bounds)

    def _capture_forward(self, bounds: StepBounds) -> None:
        self._buffer[:HEADER_SIZE].zero_()  # no sequences: nothing but padding runs
        self._graphs.capture(bounds, lambda: self._forward(bounds))

    def _captured_bounds(self, count: _Counts) -> StepBounds | None:
        """Of the graph that serves a step; None where it is to be launched one by one."""
        if not self._use_graphs:
            return None
        if not count.chunks:
            return self._decode_bounds(graphs.fitting(self._batch_sizes, count.decodes))
        if count.tokens > self._mixed_sizes[-1] or count.chunks > graphs.MAX_MIXED_CHUNKS:
            return None
        return self._mixed_bounds(graphs.fitting(self._mixed_sizes, count.tokens))

    def _decode_bounds(self, size: int) -> StepBounds:
        return StepBounds(size, size, 0, size, 1)

    def _mixed_bounds(self, size: int) -> StepBounds:
        lines = min(size, self._batch.num_rows)
        return StepBounds(size, lines, min(lines, graphs.MAX_MIXED_CHUNKS), lines, size)

    def _exact(self, chunks: Chunks, count: _Counts, num_samples: int) -> StepBounds:
        """Of a step that is launched one by one."""
        return StepBounds(
            count.tokens,
            count.decodes,
            count.chunks,
            graphs.fitting(self._batch_sizes, num_samples) if num_samples else 0,
            int(chunks.length.max(initial=1)),
        )

    def _forward(self, bounds: StepBounds) -> Tensor:
        """Launch the first half of a step: [T, D] hidden states; those to sample from are kept."""
        step, num_tokens = self._step, bounds.tokens
        prepare_step(
            self._buffer,
            self._layout,
            self._rows,
            step,
            block_size=self._batch.block_size,
            num_tokens=max(num_tokens, bounds.samples),
        )
        hidden_TD = self._model.forward(
            step.token_ids_T[:num_tokens],
            step.positions_T[:num_tokens],
            self._kv_caches,
            self._metadata(bounds),
        )
        torch.index_select(
            hidden_TD, 0, step.sample_token_S[: bounds.samples], out=self._hidden_SD[: bounds.samples]
        )
        return hidden_TD

    def _metadata(self, bounds: StepBounds) -> AttentionMetadata:
        step, table_width = self._step, self._step.block_table_BN.shape[1]
        max_len = self._batch.history_RM.shape[1]
        return AttentionMetadata(
            num_decodes=bounds.decodes,
            block_table_BN=step.block_table_BN,
            seq_lens_B=step.seq_lens_B,
            query_start_B1=self._query_start_B1,
            slot_mapping_T=step.slot_mapping_T[: bounds.tokens],
            max_query_len=bounds.query_len,
            max_seq_len=min(max_len, table_width * self._batch.block_size),
            counts=self._counts,
            num_chunks=bounds.chunks,
            num_chunk_tokens=bounds.tokens if bounds.chunks else 0,
        )

    # ------------------------------------------------------------------------------------ sampling

    def _launch_sampling(self, landing: Landing, count: int) -> SampleResult:
        """Launch the second half of a step and the copy of its outcome."""
        size = graphs.fitting(self._batch_sizes, count)
        logprobs: LogprobTensors | None = None
        if self._draw.logprobs is not None:
            logprobs = self._sample_with_logprobs(size, self._draw.logprobs)
        elif self._use_graphs:
            self._graphs.replay((self._draw.variant, size))
        else:
            self._sample(self._draw.variant, size)
        landing.out_tensor.copy_(self._out_4S, non_blocking=True)
        return landing.sampled(count, logprobs)

    def _plan_sampling(self, rows: IntArray) -> None:
        """Which draw these rows need; kept while neither they nor their requests change."""
        if not len(rows) or (self._planned_rows is rows and self._planned_version == self._sampler.version):
            return
        layout = self._sampler.layout_version
        self._draw = self._sampler.plan(rows)
        self._planned_rows, self._planned_version = rows, self._sampler.version
        if self._sampler.layout_version != layout:  # a table has moved: graphs of draws hold its old address
            self._graphs.forget(keep=lambda key: isinstance(key, StepBounds))
        size = graphs.fitting(self._batch_sizes, len(rows))
        if self._use_graphs and (self._draw.variant, size) not in self._graphs:
            self._capture_draw(self._draw.variant, size)

    def _capture_draw(self, variant: Variant, size: int) -> None:
        self._step.sample_row_S.fill_(-1)  # no rows: nothing is drawn
        self._graphs.capture((variant, size), lambda: self._sample(variant, size))

    def _sample(self, variant: Variant, size: int) -> Tensor:
        """Draw for the first `size` lines and advance their rows; returns the logits, unchanged."""
        logits_SV: Tensor = self._model.lm_head(self._hidden_SD[:size])
        self._sampler.draw(logits_SV, self._step.sample_row_S[:size], self._batch, self._out_4S, variant)
        return logits_SV

    def _sample_with_logprobs(self, size: int, wanted: LogprobRows) -> LogprobTensors:
        logits_SV = self._sample(self._draw.variant, size)
        position_b = wanted.subset.position_b
        logits_bV = self._model.finish_logits(logits_SV.index_select(0, position_b))
        columns = gather_logprobs(logits_bV, self._out_4S[0].index_select(0, position_b), wanted.k)
        return LogprobTensors(wanted.rows, position_b, columns_to_host(columns))


def _put(host: IntArray, start: int, *parts: Sequence[int] | IntArray) -> None:
    """Write arrays one after another."""
    for part in parts:
        values = np.asarray(part)
        host[start : start + len(values)] = values
        start += len(values)


def _step_tensors(batch: DeviceBatch, max_tokens: int, frozen_S: Tensor) -> StepTensors:
    def zeros(size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=batch.device)

    return StepTensors(
        token_ids_T=zeros(max_tokens, torch.int32),
        positions_T=zeros(max_tokens, torch.int64),
        slot_mapping_T=zeros(max_tokens, torch.int64),
        seq_lens_B=zeros(batch.num_rows, torch.int32),
        block_table_BN=torch.zeros_like(batch.block_table_RN),
        sample_token_S=zeros(batch.num_rows, torch.int32),
        sample_row_S=zeros(batch.num_rows, torch.int32),
        frozen_S=frozen_S,
    )
