"""The scheduler: a plain object that turns requests and results into plans and outputs.

There are no prefill or decode phases. Every running request catches `computed` up with the tokens that it
has; one that has caught up computes one token a step. A step holds all rows that decode and, in what is left
of the token budget, chunks of prompts. Plans carry differences: the columns of `RowTable` advance by vector
operations, and Python runs per request only for one that arrives, crosses a block boundary or ends.

It owns no socket, clock or tensor: time is an argument, so any history of calls can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from tercet.config import SchedulerConfig
from tercet.core_proc import tracing
from tercet.core_proc.block_pool import BlockPool
from tercet.core_proc.prefix_cache import BlockHasher
from tercet.core_proc.request import NO_ROW, Prompt, Request
from tercet.core_proc.rows import RowTable
from tercet.core_proc.telemetry import TokenGaps
from tercet.core_proc.waiting_queue import WaitingQueue
from tercet.ipc.messages import AddRequest, Admission, Audit, Finish, PauseMode, RowState, StepPlan

_DECODE = int(RowState.DECODE)  # numpy is slow to see that an enum's member is a number
_LOOKAHEAD = 64  # waiting requests looked at past one that must wait for its turn


@dataclass(slots=True)
class Counters:
    """Totals since the core started."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    recomputed_tokens: int = 0
    num_finished: int = 0
    num_aborted: int = 0


@dataclass(slots=True)
class Draft:
    """Changes that the next plan will carry. They outlive a step in which nothing runs."""

    releases: list[int] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    states: dict[int, int] = field(default_factory=dict)  # row -> RowState
    appends: np.ndarray | None = None  # i32[k, 4], as in StepPlan.blocks
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list)


class Scheduler:
    """Plans steps over one block pool and one table of rows.

    `epoch` stamps every plan. `num_blocks` counts the null block. `step` is the last plan made,
    `applied_step` the last whose result was applied.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        epoch: int = 1,
        hash_key: bytes | None = None,
    ) -> None:
        self.config = config
        self.epoch = epoch
        self.block_size = block_size
        self.caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.hasher = BlockHasher(block_size, hash_key)
        self.rows = RowTable(config.max_num_seqs, config.max_model_len, block_size)
        self.waiting = WaitingQueue(config.policy)
        self.requests: dict[tuple[int, int], Request] = {}  # (frontend, handle) -> unfinished request
        self.counters = Counters()
        self.gaps = TokenGaps()
        self.num_corrupted = 0  # requests whose computation failed
        self.unfinished: dict[int, int] = {}  # requests of each frontend that has any
        self.on_end: Callable[[Request, Finish], None] | None = (
            None  # told of each that leaves, in no row then
        )
        self.planned_tokens = self.planned_decodes = 0  # of the last plan
        self.step = 0
        self.applied_step = 0
        self.paused: PauseMode | None = None
        # Preempted requests whose last results are in flight: (row, gen) -> request.
        self.draining: dict[tuple[int, int], Request] = {}
        # Requests that want prompt logprobs: step that computes a chunk of theirs -> row -> request.
        self.scoring: dict[int, dict[int, Request]] = {}
        # The request that last found blocks short, and how many were published, free and held by rows then.
        self._short: tuple[Request, int, int, int] | None = None
        self._draft = Draft()
        self._prefilling: list[int] = []  # rows, in order of admission
        self._arrivals = 0

    # ---------------------------------------------------------------------------------- arrivals, aborts

    def add(self, frontend: int, message: AddRequest, now: float) -> None:
        """Queue the children of a request that was checked against the limits."""
        limit = min(message.prompt_len + message.sampling.max_tokens, self.config.max_model_len)
        # One copy for all children: a received frame is not to be kept alive by a long request.
        token_ids = np.array(message.token_ids, np.int32)
        message = msgspec.structs.replace(message, token_ids=token_ids)
        prompt = Prompt(message, self.hasher.root(message.cache_salt, message.adapter))
        for child, seed in enumerate(message.seeds):
            self._arrivals += 1
            request = Request(
                frontend=frontend,
                handle=message.handle + child,
                seed=seed,
                prompt=prompt,
                token_ids=token_ids,
                arrival=self._arrivals,
                arrival_s=now,
                max_total=limit,
                prompt_logprobs_from=-1 if message.sampling.prompt_logprobs is None else 1,
            )
            if message.trace:
                tracing.begin(request)
            self.requests[frontend, request.handle] = request
            self.unfinished[frontend] = self.unfinished.get(frontend, 0) + 1
            self.waiting.push(request)

    def abort(self, frontend: int, handles: Iterable[int], *, stopped: bool = False) -> int:
        """End requests; unknown and ended ones are skipped. Returns how many were ended.

        Args:
            stopped: their frontend found a stop string, so they count as finished.
        """
        count = 0
        for handle in handles:
            request = self.requests.get((frontend, handle))
            if request is not None:
                self.end(request, Finish.EOS if stopped else Finish.ABORT)
                count += 1
        if stopped:
            self.counters.num_finished += count
        else:
            self.counters.num_aborted += count
        return count

    def abort_frontend(self, frontend: int) -> int:
        """End every request of a frontend that has left."""
        # Last first, so that the waiting queue is emptied from its end.
        return self.abort(
            frontend, [handle for owner, handle in reversed(self.requests) if owner == frontend]
        )

    def end(self, request: Request, finish: Finish) -> None:
        """Forget a request, wherever it is; its blocks are free from the next plan on."""
        del self.requests[request.frontend, request.handle]
        self.unfinished[request.frontend] -= 1
        if not self.unfinished[request.frontend]:
            del self.unfinished[request.frontend]
        if request.row != NO_ROW:
            self._leave_row(request)
        else:
            self.waiting.remove(request)
        if self.on_end is not None:
            self.on_end(request, finish)

    def _leave_row(self, request: Request) -> None:
        """Keep the contents of what was computed, give back blocks and row."""
        row = request.row
        blocks = self.rows.blocks_of(row)
        self._publish(request, 0, min(int(self.rows.computed[row]), int(self.rows.known[row])))
        self.pool.release(blocks)
        if self.rows.state[row] == RowState.PREFILL:
            self._prefilling.remove(row)
        self.rows.vacate(row)
        draft = self._draft
        draft.releases.append(row)
        draft.states.pop(row, None)

    # ---------------------------------------------------------------------------------- planning

    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def is_unfinished(self, request: Request) -> bool:
        return self.requests.get((request.frontend, request.handle)) is request

    @property
    def num_in_flight(self) -> int:
        """Plans whose results are not applied yet."""
        return self.step - self.applied_step

    @property
    def at_rest(self) -> bool:
        """Whether a pause has been reached: nothing in flight and, under WAIT, nothing half finished."""
        if self.num_in_flight:
            return False
        if self.paused is not PauseMode.WAIT:
            return True
        return not self.rows.num_running and all(request.started_s < 0 for request in self.waiting)

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None where nothing can run before a result or a message changes something."""
        if self.paused is PauseMode.KEEP:
            return None
        decoding = self.rows.state == _DECODE
        preempted = self._grow(decoding)
        num_decodes = int(np.count_nonzero(decoding))
        budget = self.config.max_num_batched_tokens - num_decodes
        budget = self._continue_prefills(budget)
        if not preempted and self.paused is not PauseMode.ABORT:
            self._admit(budget, now)
        if num_decodes == 0 and not self._draft.chunks:
            return None
        self.step += 1
        self.planned_decodes = num_decodes
        self.planned_tokens = num_decodes + sum([chunk[2] for chunk in self._draft.chunks])
        plan = self._build_plan(decoding)
        # From here on the next plan's draft is written.
        self._advance_decodes(decoding)
        self._advance_chunks(plan)
        return plan

    def _grow(self, decoding: np.ndarray) -> bool:
        """Give a block to each decoding row that has none for its next token; preempt where none is left.

        Clears preempted rows from `decoding`. Returns whether any was.
        """
        rows = self.rows
        full = (decoding & (rows.computed >= rows.capacity)).nonzero()[0]
        if not len(full):
            return False
        preempted = False
        if len(full) > self.pool.num_free:
            preempted = self._preempt_until_free(full, decoding)
            full = full[decoding[full]]
            if not len(full):
                return preempted
        # Rows that decode are in this step's plan for certain, and so are their blocks.
        self._draft.appends = rows.append_blocks(full, self.pool.allocate_many(len(full)))
        return preempted

    def _preempt_until_free(self, full: np.ndarray, decoding: np.ndarray) -> bool:
        """Preempt, last in line first, until each row of `full` that is left can have a block."""
        for victim in sorted(self.rows.occupied(), key=self._row_key, reverse=True):
            if int(np.count_nonzero(decoding[full])) <= self.pool.num_free:
                break
            self._preempt(victim)
            decoding[victim] = False
        return True

    def _row_key(self, row: int) -> tuple[int, ...] | int:
        key: tuple[int, ...] | int = self.waiting.key(self.rows.requests[row])
        return key

    def _preempt(self, row: int) -> None:
        """Give up a row; its tokens are computed again later, what is in flight still counts."""
        request = self.rows.requests[row]
        assert request is not None
        if self.num_in_flight:
            self.draining[row, int(self.rows.gen[row])] = request
            request.wait_for_step = self.step
        self.counters.num_preemptions += 1
        self.counters.recomputed_tokens += int(self.rows.computed[row])
        request.num_preemptions += 1
        self._leave_row(request)
        self.waiting.push(request)

    def _continue_prefills(self, budget: int) -> int:
        for row in self._prefilling:
            if budget <= 0:
                break
            budget -= self._add_chunk(row, budget)
        return budget

    def _admit(self, budget: int, now: float) -> None:
        """Move waiting requests into rows while rows, blocks and token budget last."""
        skipped: list[Request] = []
        while budget > 0 and self.rows.num_free and len(skipped) < _LOOKAHEAD:
            request = self._next_waiting()
            if request is None or request.wait_for_step > self.applied_step:
                break
            if self._too_many_long(request):
                self.waiting.remove(request)
                skipped.append(request)
                continue
            if self._is_still_short(request):
                break
            if not self._occupy(request, now):
                self._short = (request, *self._fit_now())
                break
            budget -= self._add_chunk(request.row, budget)
        for request in skipped:
            self.waiting.push(request)

    def _fit_now(self) -> tuple[int, int, int]:
        return self.pool.num_published, self.pool.num_free, self.rows.num_running

    def _is_still_short(self, request: Request) -> bool:
        """Whether blocks were short for this request, and nothing has changed since in its favour.

        Saves looking up its prefix again in every step that it waits.
        """
        if self._short is None or self._short[0] is not request:
            return False
        _, published_then, free_then, running_then = self._short
        published, free, running = self._fit_now()
        return published == published_then and free <= free_then and running >= running_then

    def _next_waiting(self) -> Request | None:
        if self.paused is PauseMode.WAIT:  # what had started and was preempted shall finish
            return next((request for request in self.waiting if request.started_s >= 0), None)
        return self.waiting.peek()

    def _too_many_long(self, request: Request) -> bool:
        config = self.config
        threshold = config.long_prefill_token_threshold
        if not config.max_long_partial_prefills or not threshold or len(request.token_ids) <= threshold:
            return False
        remaining = self.rows.known[self._prefilling] - self.rows.computed[self._prefilling]
        return int(np.count_nonzero(remaining > threshold)) >= config.max_long_partial_prefills

    def _occupy(self, request: Request, now: float) -> bool:
        """Reserve blocks for all tokens of a request and give it a row. False where blocks are short."""
        hits = self._find_prefix(request)
        num_new = -(-len(request.token_ids) // self.block_size) - len(hits)
        available = self.pool.num_free - sum(self.pool.is_evictable(block) for block in hits)
        # With others running, leave each a chance to grow before someone must be preempted for it.
        reserve = self.rows.num_running // self.block_size
        if num_new + reserve > available:
            return False
        self.waiting.remove(request)
        for block in hits:
            self.pool.share(block)
        blocks = hits + self.pool.allocate_many(num_new)
        num_cached = len(hits) * self.block_size
        self._count_admission(request, num_cached, now)
        row = self.rows.occupy(request, blocks, num_cached)
        self.rows.unstarted[row] = not request.started_sent
        self._prefilling.append(row)
        self._draft.admissions.append(self._admission(request, blocks, num_cached))
        return True

    def _find_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the longest known prefix; the last token is always computed, for its logits."""
        if not self.caching:
            return []
        prompt, token_ids = request.prompt, request.token_ids
        self.hasher.extend(prompt.hashes, prompt.root, token_ids[: request.prompt_len])
        if len(request.hashes) < len(prompt.hashes):
            request.hashes = list(prompt.hashes)
        self.hasher.extend(request.hashes, prompt.root, token_ids)
        if not prompt.message.read_prefix_cache or request.sampling.prompt_logprobs is not None:
            return []
        hits = []
        size = self.block_size
        for index in range(min(len(request.hashes), (len(token_ids) - 1) // size)):
            block = self.pool.find(
                request.hashes[index], token_ids[index * size : (index + 1) * size].tobytes()
            )
            if block is None:
                break
            hits.append(block)
        return hits

    def _count_admission(self, request: Request, num_cached: int, now: float) -> None:
        counters = self.counters
        if self.caching and request.num_preemptions == 0:
            counters.prefix_cache_queries += len(request.token_ids)
            counters.prefix_cache_hits += num_cached
        if request.started_s < 0:
            request.started_s = now
            request.num_cached_tokens = num_cached
            counters.prompt_tokens += request.prompt_len

    def _admission(self, request: Request, blocks: list[int], num_computed: int) -> Admission:
        return Admission(
            row=request.row,
            gen=int(self.rows.gen[request.row]),
            handle=request.handle,
            prompt_len=request.prompt_len,
            token_ids=request.token_ids,
            num_computed=num_computed,
            seed=request.seed,
            sampling=request.sampling,
            blocks=[np.array(blocks, np.int32)],
            prompt_logprobs_from=request.prompt_logprobs_from,
            trace=request.trace,
            frontend=request.frontend if request.trace else 0,
        )

    def _add_chunk(self, row: int, budget: int) -> int:
        """Plan the next tokens of a prompt; returns how many."""
        start, known = int(self.rows.computed[row]), int(self.rows.known[row])
        length = min(known - start, budget)
        if self.config.long_prefill_token_threshold:
            length = min(length, self.config.long_prefill_token_threshold)
        self._draft.chunks.append((row, start, length, int(start + length == known)))
        request = self.rows.requests[row]
        assert request is not None
        # Shareable from the plan that computes it: a layer writes all keys and values before any is read.
        self._publish(request, start, start + length)
        return length

    def _publish(self, request: Request, start: int, stop: int) -> None:
        """Let full blocks of positions [start, stop) be found by their contents."""
        if not self.caching:
            return
        size, row = self.block_size, request.row
        first, last = start // size, stop // size
        if first >= last:
            return
        tokens = self.rows.tokens[row]
        self.hasher.extend(request.hashes, request.prompt.root, tokens[: last * size])
        for index in range(first, last):
            block = int(self.rows.blocks[row, index])
            self.pool.publish(
                block, request.hashes[index], tokens[index * size : (index + 1) * size].tobytes()
            )

    def _advance_decodes(self, decoding: np.ndarray) -> None:
        rows = self.rows
        rows.computed += decoding
        rows.planned += decoding
        # No step is planned that is known to pass the limit: the device will finish these at this step.
        for row in (decoding & (rows.planned >= rows.limit)).nonzero()[0].tolist():
            self._draft.states[row] = RowState.HELD
            rows.state[row] = RowState.HELD

    def _advance_chunks(self, plan: StepPlan) -> None:
        """Account for the chunks of a plan just built; what samples decodes from the next plan on."""
        if plan.chunks is None:
            return
        rows = self.rows
        for row, start, length, sample in plan.chunks.tolist():
            rows.computed[row] = start + length
            request = rows.requests[row]
            assert request is not None
            if request.prompt_logprobs_from >= 0:
                self.scoring.setdefault(plan.step, {})[row] = request
            if sample:
                rows.planned[row] += 1
                state = RowState.DECODE if rows.planned[row] < rows.limit[row] else RowState.HELD
                self._prefilling.remove(row)
                self._draft.states[row] = state
                rows.state[row] = state

    def _build_plan(self, decoding: np.ndarray) -> StepPlan:
        """Take the draft. Columns without entries are absent."""
        draft, self._draft = self._draft, Draft()
        max_len = int(np.maximum.reduce(self.rows.computed, where=decoding, initial=-1)) + 1
        for _, start, length, _ in draft.chunks:
            max_len = max(max_len, start + length)
        return StepPlan(
            epoch=self.epoch,
            step=self.step,
            max_len=max_len,
            releases=_column(draft.releases),
            admissions=draft.admissions,
            states=_column(list(draft.states.items())),
            blocks=draft.appends,
            chunks=_column(draft.chunks),
            audit=self._audit() if self.config.audit else None,
        )

    # ---------------------------------------------------------------------------------- accounts

    def reset_prefix_cache(self) -> bool:
        """Forget all cached contents; True if no running request held any of it."""
        return self.pool.reset()

    def preempt_all(self) -> None:
        """Give up every row, so that nothing depends on the cache's contents."""
        for row in self.rows.occupied():
            self._preempt(row)

    def _audit(self) -> Audit:
        rows = self.rows
        live = rows.occupied()
        blocks = [rows.blocks_of(row) for row in live]
        return Audit(
            row=np.array(live, np.int32),
            gen=rows.gen[live],
            state=rows.state[live],
            block_offset=np.cumsum([0, *map(len, blocks)], dtype=np.int32),
            block=np.array([block for held in blocks for block in held], np.int32),
        )

    def check_invariants(self) -> None:
        """Recount blocks and rows.

        Raises:
            AssertionError: the accounts do not agree.
        """
        rows = self.rows
        live = rows.occupied()
        self.pool.check_invariants(rows.blocks_of(row) for row in live)
        assert len(live) == rows.num_running, "a row is lost"
        running = {(r.frontend, r.handle) for r in rows.requests if r is not None}
        waiting = {(r.frontend, r.handle) for r in self.waiting}
        assert not running & waiting, "a request runs and waits"
        assert running | waiting == self.requests.keys(), "a request is lost"
        prefilling = np.flatnonzero(rows.state == int(RowState.PREFILL)).tolist()
        assert sorted(self._prefilling) == prefilling, "a prompt is forgotten"
        owners = {row: request for row, request in enumerate(rows.requests) if request is not None}
        assert list(owners) == live and all(r.row == row for row, r in owners.items()), (
            "rows and requests disagree"
        )
        known, planned, computed = rows.known[live], rows.planned[live], rows.computed[live]
        assert (known <= planned).all() and (planned <= rows.limit[live]).all(), "counts out of order"
        assert (computed <= rows.capacity[live]).all(), "tokens without a block"
        behind = (planned - computed)[rows.state[live] == _DECODE]
        assert (behind == 1).all(), "a decoding row is not one token behind"


def _column(
    entries: list[int] | list[tuple[int, int]] | list[tuple[int, int, int, int]],
) -> np.ndarray | None:
    return np.array(entries, np.int32) if entries else None
