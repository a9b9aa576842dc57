"""Random histories of a scheduler: whatever happens, every stream is what the model says and nothing is lost.

Each history is drawn from a seed: sizes of everything, arrivals of several frontends with shared and salted
prefixes and with the answers of earlier requests in their prompts, aborts, handles given away, frontends that
leave, pauses of every kind, cache resets, failing rows, and the moment at which each result is applied. A failure
names its history: `play(seed, depth=…)` is the same again.

What makes a wrong schedule show: the simulated worker's tokens depend on every cache entry of their context,
it rechecks the whole context of each row at each step (`verify`), it compares its tables with the core's at
each step (`audit`), and the scheduler recounts all blocks after each call.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from tercet.core_proc.block_pool import BlockPool
from tercet.core_proc.results import apply_result
from tercet.ipc.messages import AddRequest, Finish, PauseMode
from tercet.worker_proc.simulated_runner import expected_tokens
from tests.conftest import FULL
from tests.core_proc import harness
from tests.core_proc.harness import VOCAB_SIZE, Engine, Stream, make_config, make_request

NUM_HISTORIES = 10_000 if FULL else 300
NUM_BATCHES = 20  # histories are tested in batches, so that a run of many shows progress
FRONTENDS = (1, 2, 3)


@dataclass
class History:
    """What happens, tick by tick."""

    sizes: dict[str, Any]
    events: list[list[tuple[str, Any]]]
    rng: random.Random


def draw_history(seed: int) -> History:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 8, 16])
    max_model_len = rng.choice([8, 24, 48])
    max_num_seqs = rng.randint(1, 8)
    needed = -(-max_model_len // block_size)
    sizes = {
        "block_size": block_size,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + rng.choice([0, 1, 5, 20, 100]),
        "num_blocks": 1 + needed + rng.choice([0, 1, needed, 4 * needed]),
        "enable_prefix_caching": rng.random() < 0.8,
        "policy": rng.choice(["fcfs", "priority"]),
        "long_prefill_token_threshold": rng.choice([0, 0, 1, 6]),
        "max_long_partial_prefills": rng.choice([0, 1, 2]),
    }
    prompts = [[rng.randrange(1, VOCAB_SIZE) for _ in range(max_model_len)] for _ in range(3)]
    events: list[list[tuple[str, Any]]] = []
    handle = 1
    for _ in range(rng.randint(1, 40)):
        tick: list[tuple[str, Any]] = []
        while rng.random() < 0.4:
            message = draw_request(rng, handle, prompts, max_model_len)
            tick.append(("add", (rng.choice(FRONTENDS), message)))
            answer, _ = Stream(message, message.seeds[0]).expected(max_model_len)
            prompts.append(
                [*message.token_ids[: message.prompt_len].tolist(), *answer]
            )  # the next turn's start
            handle += len(message.seeds)
        if rng.random() < 0.1:
            tick.append(("abort", (rng.choice(FRONTENDS), rng.randrange(1, handle + 1))))
        if rng.random() < 0.1:
            what = rng.choice(["leave", "reset", "pause", "pause"])
            tick.append((what, rng.choice(FRONTENDS if what == "leave" else list(PauseMode))))
        events.append(tick)
    add_replacements(events, random.Random(seed + 10**9), prompts, max_model_len)
    return History(sizes, events, rng)


def add_replacements(
    events: list[list[tuple[str, Any]]], rng: random.Random, prompts: list[list[int]], max_model_len: int
) -> None:
    """Requests that are aborted wherever they are, preempted or in flight, and whose handles are given away at once.

    Sometimes again and again in one tick: then results in flight belong to several earlier owners of a handle.
    """
    for tick in events:
        while rng.random() < 0.15:
            frontend, pick = rng.choice(FRONTENDS), rng.randrange(1000)
            for _ in range(rng.choice([1, 1, 3])):
                message = draw_request(rng, 1, prompts, max_model_len)
                tick.insert(rng.randint(0, len(tick)), ("replace", (frontend, message, pick)))


def draw_request(rng: random.Random, handle: int, prompts: list[list[int]], max_model_len: int) -> AddRequest:
    whole = rng.choice(prompts)
    prompt = whole[: rng.choice([len(whole), rng.randint(1, max_model_len - 1)])]
    if rng.random() < 0.5:
        prompt = prompt + [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 8))]
    prompt = prompt[: max_model_len - 1]
    length = len(prompt)
    max_tokens = rng.choice([1, 2, 5, 20, max_model_len])
    num_children = rng.choice([1, 1, 1, 2, 4])
    outputs: list[int] = []
    if num_children == 1 and max_tokens > 1 and length < max_model_len - 2 and rng.random() < 0.2:
        count = rng.randint(1, min(max_tokens, max_model_len - length) - 1)
        outputs = expected_tokens(prompt, count, VOCAB_SIZE)
    return make_request(
        prompt,
        handle=handle,
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, 0, 1, max_tokens]),
        seeds=None if outputs or num_children == 1 else [rng.getrandbits(64) for _ in range(num_children)],
        outputs=outputs,
        priority=rng.randint(-2, 2),
        cache_salt=rng.choice(["", "", "salt"]),
        eos_token_ids=[] if outputs else rng.sample(range(VOCAB_SIZE), rng.choice([0, 1, 8, 30])),
        stop_token_ids=[] if outputs else rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 8])),
        read_prefix_cache=rng.random() < 0.9,
        logprobs=1 if rng.random() < 0.02 else None,
    )


def play(seed: int, *, depth: int) -> Engine:
    """Play a history with up to `depth` steps in flight, results applied at random moments, and check it."""
    history = draw_history(seed)
    rng = random.Random(seed + depth)
    engine = Engine(make_config(**history.sizes))
    for tick in history.events:
        for what, value in tick:
            happen(engine, what, value)
        turn(engine, rng, depth)
        if engine.scheduler.paused is not None and rng.random() < 0.5:
            resume(engine, rng, depth)
    resume(engine, rng, depth)
    most = sum(len(s.message.token_ids) + s.message.sampling.max_tokens for s in engine.streams.values())
    engine.run(max_steps=2 * most + 100, depth=depth)
    engine.check_streams()
    engine.check_empty()
    return engine


def happen(engine: Engine, what: str, value: Any) -> None:
    match what:
        case "add":
            engine.add(value[1], frontend=value[0])
        case "abort":
            engine.abort(value[1], frontend=value[0])
        case "replace":
            replace(engine, *value)
        case "leave":
            for (frontend, _), stream in engine.streams.items():
                stream.aborted |= frontend == value and not stream.finish
            engine.scheduler.abort_frontend(value)
        case "reset":
            engine.scheduler.reset_prefix_cache()
        case "pause":
            engine.pause(value)


def replace(engine: Engine, frontend: int, message: AddRequest, pick: int) -> None:
    """Abort a request, or take one that has ended, and give its handle, and those after it, to another."""
    handles = sorted(handle for owner, handle in engine.streams if owner == frontend)
    if not handles:
        return
    first = handles[pick % len(handles)]
    last = max(handle for _, handle in engine.streams)  # what follows is for requests yet to come
    message = msgspec.structs.replace(message, handle=first, seeds=message.seeds[: 1 + last - first])
    for handle in range(first, first + len(message.seeds)):
        engine.abort(handle, frontend)
        if (old := engine.streams.pop((frontend, handle), None)) is not None:
            engine.replaced.append(old)
    engine.add(message, frontend)


def turn(engine: Engine, rng: random.Random, depth: int) -> None:
    """Launch and apply in a random order, a few times."""
    for _ in range(rng.randint(1, 4)):
        if engine.in_flight and (len(engine.in_flight) >= depth or rng.random() < 0.4):
            engine.land()
        else:
            engine.launch()


def resume(engine: Engine, rng: random.Random, depth: int) -> None:
    """Wait until a pause has come to rest, clear the cache or not, and go on."""
    if engine.scheduler.paused is None:
        return
    for _ in range(10_000):
        if engine.scheduler.at_rest:
            break
        turn(engine, rng, depth)
    assert engine.scheduler.at_rest, "a pause never comes to rest"
    if engine.scheduler.paused is PauseMode.WAIT:
        assert engine.scheduler.rows.num_running == 0
    if rng.random() < 0.7:
        assert engine.clear_cache_at_rest()
    engine.scheduler.check_invariants()
    engine.scheduler.paused = None


@pytest.mark.parametrize("batch", range(NUM_BATCHES))
@pytest.mark.timeout(1200)
def test_random_histories_lose_and_repeat_nothing(batch: int) -> None:
    for seed in range(batch, NUM_HISTORIES, NUM_BATCHES):
        depth = 1 + seed // NUM_BATCHES % 3
        try:
            play(seed, depth=depth)
        except Exception as error:
            raise AssertionError(f"play({seed}, depth={depth}): {error}") from error


def test_histories_reach_the_rare_places() -> None:
    """The oracle is only as good as what it sees: preemptions, cache hits, aborts, every finish."""
    engines = [play(seed, depth=2) for seed in range(60)]
    counters = [engine.scheduler.counters for engine in engines]
    assert sum(c.num_preemptions for c in counters) > 20
    assert sum(c.prefix_cache_hits for c in counters) > 500
    assert sum(c.num_aborted for c in counters) > 20
    replaced = [stream for engine in engines for stream in engine.replaced]
    assert sum(stream.aborted and bool(stream.tokens) for stream in replaced) > 10
    streams = [stream for engine in engines for stream in (*engine.streams.values(), *engine.replaced)]
    assert {stream.finish for stream in streams} == set(Finish)


@pytest.mark.parametrize("depth", [2, 3])
def test_overlapped_streams_equal_plain_ones(depth: int) -> None:
    """Not only both equal to the model: a history without aborts gives the same streams, ends included."""
    for seed in range(1000, 1020):
        plain, overlapped = (_without_aborts(seed, d) for d in (1, depth))
        assert plain == overlapped, f"seed {seed}"


def _without_aborts(seed: int, depth: int) -> dict[tuple[int, int], tuple[list[int], Finish]]:
    history = draw_history(seed)
    engine = Engine(make_config(**history.sizes))
    for tick in history.events:
        for what, value in tick:
            if what == "add" and value[1].sampling.logprobs is None:
                engine.add(value[1], frontend=value[0])
        engine.launch()
        while len(engine.in_flight) >= depth:
            engine.land()
    engine.run(depth=depth)
    return {key: (stream.tokens, stream.finish) for key, stream in engine.streams.items()}


def converse() -> None:
    """Second turns after first turns that ended by a token, at every place in a block."""
    for length in range(1, 10):
        engine = Engine()
        prompt = list(range(1, 1 + length))
        stop = expected_tokens(prompt, 3, VOCAB_SIZE)[-1]
        (first,) = engine.add(make_request(prompt, max_tokens=20, eos_token_ids=[stop]))
        engine.run(depth=2)
        engine.add(make_request([*prompt, *first.tokens, 7, 8], handle=2))
        engine.run(depth=2)
        engine.check_streams()


def test_second_turns_find_the_first_in_the_cache() -> None:
    converse()


# ------------------------------------------------------------------------------------------ planted faults


def _finds_a_fault() -> bool:
    for seed in range(60):
        try:
            play(seed, depth=2)
        except (AssertionError, KeyError, IndexError, ValueError):
            return True
    return False


def test_a_block_freed_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scheduler's own recount switched off, the tokens alone must show it."""
    monkeypatch.setattr("tercet.core_proc.scheduler.Scheduler.check_invariants", lambda self: None)
    share = BlockPool.share

    def share_without_taking(pool: BlockPool, block: int) -> None:
        share(pool, block)
        pool._ref_cnt[block] -= 1
        if pool._ref_cnt[block] == 0:
            pool._evictable[block] = None

    monkeypatch.setattr(BlockPool, "share", share_without_taking)
    assert _finds_a_fault()


def test_a_frozen_row_published_whole_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a row that has ended is not in the cache, though a step was planned with it."""
    from tercet.core_proc import results

    def finish_rows(scheduler: Any, result: Any, entries: Any) -> None:
        for row, gen, finish in zip(result.row, result.gen, result.finish, strict=True):
            request = scheduler.rows.requests[row]
            if finish and request is not None and scheduler.rows.gen[row] == gen:
                scheduler.end(request, Finish.ABORT)

    monkeypatch.setattr(results, "_finish_rows", finish_rows)
    with pytest.raises(AssertionError, match="does not hold its tokens"):
        converse()


def test_a_token_applied_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(scheduler: Any, result: Any, now: float) -> Any:
        outgoing = apply_result(scheduler, result, now)
        if result.step % 7 == 0 and len(result.row):
            scheduler.rows.known[result.row[0]] -= 1
        return outgoing

    monkeypatch.setattr(harness, "apply_result", forgetful)
    assert _finds_a_fault()


def test_without_a_planted_fault_none_is_found() -> None:
    assert not _finds_a_fault()
