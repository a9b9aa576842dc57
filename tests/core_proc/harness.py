"""A scheduler and a simulated worker in one process, stepped by hand: no socket, clock, tensor or torch.

`Engine` plays both loops of the core: `step()` is the plain one, `launch()` and `land()` let a test hold as
many steps in flight as it likes and apply their results when it likes. Every stream is recorded as its
frontend would see it, and is held against `expected_tokens`, which knows nothing of scheduling.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from tercet.config import (
    CacheConfig,
    EngineArgs,
    EngineConfig,
    ProcessConfig,
    SchedulerConfig,
    SimulationConfig,
)
from tercet.core_proc.checks import check_request
from tercet.core_proc.results import Outgoing, apply_result, end_outputs
from tercet.core_proc.scheduler import Scheduler
from tercet.ipc.messages import (
    AddRequest,
    Finish,
    Limits,
    ModelInfo,
    PauseMode,
    RequestFailed,
    Sampling,
    StepOutputs,
    StepPlan,
    StepResult,
)
from tercet.worker_proc.simulated_runner import SimulatedRunner, expected_tokens

VOCAB_SIZE = 97  # small, so that stop tokens do come up
HASH_KEY = b"tests"


def make_config(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 64,
    verify: bool = True,
    enable_prefix_caching: bool = True,
    vocab_size: int = VOCAB_SIZE,
    **scheduler: Any,
) -> EngineConfig:
    """An engine on a simulated worker. Sizes are small, so that a test meets their limits."""
    args = EngineArgs(
        device="simulated",
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_gpu_blocks_override=num_blocks,
        enable_prefix_caching=enable_prefix_caching,
        hf_overrides={"vocab_size": vocab_size},
        simulation=SimulationConfig(verify=verify),
        audit=verify,
    )
    config = args.create_engine_config()
    return msgspec.structs.replace(config, scheduler=msgspec.structs.replace(config.scheduler, **scheduler))


def make_scheduler(config: EngineConfig) -> Scheduler:
    cache: CacheConfig = config.cache
    assert cache.num_blocks_override is not None
    return Scheduler(
        config.scheduler,
        num_blocks=cache.num_blocks_override,
        block_size=cache.block_size,
        enable_prefix_caching=cache.enable_prefix_caching,
        hash_key=HASH_KEY,
    )


def make_request(
    prompt: list[int] | int,
    *,
    max_tokens: int = 4,
    handle: int = 1,
    seeds: list[int] | None = None,
    priority: int = 0,
    cache_salt: str = "",
    outputs: list[int] | None = None,
    read_prefix_cache: bool = True,
    **sampling: Any,
) -> AddRequest:
    """A greedy request. `prompt` may be a length: then tokens 1, 2, 3, …"""
    tokens = [1 + i % (VOCAB_SIZE - 1) for i in range(prompt)] if isinstance(prompt, int) else prompt
    sampling.setdefault("temperature", 0.0 if seeds is None else 1.0)
    return AddRequest(
        epoch=1,
        handle=handle,
        token_ids=np.array(tokens + (outputs or []), np.int32),
        prompt_len=len(tokens),
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        seeds=[0] if seeds is None else seeds,
        priority=priority,
        cache_salt=cache_salt,
        read_prefix_cache=read_prefix_cache,
    )


@dataclass
class Stream:
    """One child as its frontend sees it."""

    message: AddRequest
    seed: int
    tokens: list[int] = field(default_factory=list)
    finish: Finish = Finish.NONE
    cached: int = -1
    aborted: bool = False
    failed: str = ""

    def expected(self, max_model_len: int) -> tuple[list[int], Finish]:
        """All tokens of this child and why it ends, from the definition of the model alone."""
        s, m = self.message.sampling, self.message
        prompt = m.token_ids[: m.prompt_len].tolist()
        room = min(s.max_tokens, max_model_len - m.prompt_len)
        seed = self.seed if s.temperature > 0 else 0
        tokens = expected_tokens(prompt, room, VOCAB_SIZE, seed)
        for i, token in enumerate(tokens):
            if i + 1 > s.min_tokens:
                if token in s.eos_token_ids:
                    return tokens[: i + 1], Finish.EOS
                if token in s.stop_token_ids:
                    return tokens[: i + 1], Finish.STOP_TOKEN
        return tokens, Finish.LENGTH


class Engine:
    """Scheduler, simulated worker and the frontends' view of both."""

    def __init__(self, config: EngineConfig | None = None, **sizes: Any) -> None:
        self.config = config or make_config(**sizes)
        self.scheduler = make_scheduler(self.config)
        process = ProcessConfig(
            engine=self.config, worker_address="", frontend_address="", runtime_dir="", epoch=1
        )
        self.runner = SimulatedRunner(process)
        self.streams: dict[tuple[int, int], Stream] = {}
        self.replaced: list[Stream] = []  # whose handle was given to another request
        self.plans: list[StepPlan] = []
        self.in_flight: deque[StepResult] = deque()
        self.now = 0.0

    @property
    def limits(self) -> SchedulerConfig:
        return self.config.scheduler

    # ------------------------------------------------------------------------------ frontends

    def add(self, message: AddRequest, frontend: int = 1) -> list[Stream]:
        """Add a request that passes the core's checks; returns its children."""
        check_request(message, _model_info(self.config), _limits(self.config))
        done = message.token_ids[message.prompt_len :].tolist()
        children = [Stream(message, seed, list(done)) for seed in message.seeds]
        for i, stream in enumerate(children):
            self.streams[frontend, message.handle + i] = stream
        self.scheduler.add(frontend, message, self.now)
        return children

    def abort(self, handle: int, frontend: int = 1) -> None:
        if (stream := self.streams.get((frontend, handle))) is not None and not stream.finish:
            stream.aborted = True
        self.scheduler.abort(frontend, [handle])

    def pause(self, mode: PauseMode) -> None:
        """As the core does; a clearing of the cache comes later, at rest."""
        scheduler = self.scheduler
        scheduler.paused = mode
        if mode is PauseMode.ABORT:
            requests = list(scheduler.requests.values())
            outputs = end_outputs(scheduler, requests, Finish.ABORT)
            for request in requests:
                self.streams[request.frontend, request.handle].aborted = True
                scheduler.end(request, Finish.ABORT)
            for frontend, message in outputs:
                self.deliver(frontend, message)

    def clear_cache_at_rest(self) -> bool:
        """What a pause ends with. Whether it could."""
        if not self.scheduler.at_rest:
            return False
        self.scheduler.preempt_all()
        assert self.scheduler.reset_prefix_cache()
        assert self.scheduler.pool.num_cached == 0
        return True

    # ------------------------------------------------------------------------------ the loops

    def launch(self) -> StepPlan | None:
        """Plan a step and run it on the worker; its result stays in flight."""
        self.now += 1.0
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check_invariants()
        if plan is not None:
            self.plans.append(plan)
            self.runner.execute(plan, 0.0, self.in_flight.append)
        return plan

    def land(self) -> Outgoing:
        """Apply the oldest result in flight and deliver what it says."""
        outgoing = apply_result(self.scheduler, self.in_flight.popleft(), self.now)
        self.scheduler.check_invariants()
        for frontend, failure in outgoing.failures:
            self._fail(frontend, failure)
        for frontend, outputs in outgoing.outputs:
            self.deliver(frontend, outputs)
        return outgoing

    def step(self) -> StepPlan | None:
        """One turn of the plain loop."""
        plan = self.launch()
        if plan is not None:
            self.land()
        return plan

    def run(self, max_steps: int = 10_000, depth: int = 1) -> int:
        """Step until every request is finished; returns the number of plans.

        Args:
            depth: steps in flight; 1 is the plain loop, 2 the overlapped one.
        """
        first = len(self.plans)
        while self.scheduler.has_unfinished() or self.in_flight:
            if self.in_flight:
                self.land()
            while len(self.in_flight) < depth and self.launch() is not None:
                pass
            assert len(self.plans) - first <= max_steps, "requests starve"
            assert self.in_flight or not self.scheduler.has_unfinished(), (
                "nothing runs and nothing is in flight"
            )
        return len(self.plans) - first

    # ------------------------------------------------------------------------------ what is seen

    def deliver(self, frontend: int, outputs: StepOutputs) -> None:
        """Book outputs on their streams, as a frontend does: every token exactly once and in order."""
        offset = outputs.offset if outputs.offset is not None else np.arange(len(outputs.handle) + 1)
        for i, handle in enumerate(outputs.handle.tolist()):
            stream = self.streams[frontend, handle]
            tokens = outputs.token[offset[i] : offset[i + 1]].tolist()
            assert not stream.finish, "a token after the finish"
            assert not stream.aborted or (not tokens and outputs.finish[i]), "a token after the abort"
            assert int(outputs.first_index[i]) == len(stream.tokens), "a token was lost or repeated"
            stream.tokens += tokens
            stream.finish = Finish(int(outputs.finish[i]))
        if outputs.started is not None:
            for handle, cached in zip(
                outputs.started.handle.tolist(), outputs.started.num_cached_tokens.tolist(), strict=True
            ):
                assert self.streams[frontend, handle].cached == -1, "started twice"
                self.streams[frontend, handle].cached = cached

    def _fail(self, frontend: int, failure: RequestFailed) -> None:
        stream = self.streams[frontend, failure.handle]
        stream.failed, stream.finish = failure.message, Finish.ERROR

    def check_streams(self) -> None:
        """Every stream holds what the model says: all of it if it finished, a prefix if it was aborted."""
        replaced = (("replaced", stream) for stream in self.replaced)
        for key, stream in (*self.streams.items(), *replaced):
            tokens, finish = stream.expected(self.limits.max_model_len)
            if stream.failed:
                assert stream.message.sampling.logprobs is not None, f"{key}: failed: {stream.failed}"
            elif stream.aborted:
                assert stream.tokens == tokens[: len(stream.tokens)], f"{key}: wrong tokens before the abort"
            else:
                assert stream.tokens == tokens, f"{key}: wrong tokens"
                assert stream.finish is finish, f"{key}: ended by {stream.finish!r}, not {finish!r}"

    def check_empty(self) -> None:
        """Nothing is held once everything has ended."""
        scheduler = self.scheduler
        scheduler.check_invariants()
        assert not scheduler.requests and not scheduler.draining and not scheduler.scoring
        assert scheduler.rows.num_running == 0 and len(scheduler.waiting) == 0
        assert scheduler.pool.num_free == scheduler.pool.num_blocks - 1


def _model_info(config: EngineConfig) -> ModelInfo:
    return ModelInfo(
        name="simulated",
        served_names=["simulated"],
        max_model_len=config.model.max_model_len,
        vocab_size=config.model.vocab_size,
        dtype="float32",
        architecture="Simulated",
        eos_token_ids=[0],
    )


def _limits(config: EngineConfig) -> Limits:
    return Limits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_waiting=config.scheduler.max_num_queued_reqs,
        max_logprobs=20,
        max_children=64,
        block_size=config.cache.block_size,
        num_blocks=config.cache.num_blocks_override or 0,
    )


def prefix_of(plan: StepPlan | None) -> dict[int, int]:
    """Tokens found in the cache, by the handle of each request that a plan admits."""
    assert plan is not None
    return {admission.handle: admission.num_computed for admission in plan.admissions}


def chunks_of(plan: StepPlan | None) -> list[tuple[int, ...]]:
    """(row, start, length, sample) of a plan's chunks."""
    assert plan is not None
    return [] if plan.chunks is None else [tuple(chunk) for chunk in plan.chunks.tolist()]
