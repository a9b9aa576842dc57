"""What the scheduler promises, a sentence a test. A simulated worker runs every plan and checks the cache."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from tercet.core_proc.prefix_cache import BlockHash
from tercet.core_proc.results import ResultError, apply_result
from tercet.core_proc.rows import FREE
from tercet.ipc.messages import Finish, PauseMode, RowState, StepPlan, StepResult
from tercet.worker_proc.simulated_runner import expected_tokens
from tests.core_proc.harness import (
    VOCAB_SIZE,
    Engine,
    Stream,
    chunks_of,
    make_request,
    prefix_of,
)


def finish_all(engine: Engine, depth: int = 1) -> None:
    engine.run(depth=depth)
    engine.check_streams()
    engine.check_empty()


# ------------------------------------------------------------------------------------ token budget, chunks


def test_a_prompt_longer_than_the_budget_is_prefilled_in_chunks() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(make_request(20, max_tokens=2))
    assert [chunks_of(engine.step()) for _ in range(3)] == [
        [(0, 0, 8, 0)],
        [(0, 8, 8, 0)],
        [(0, 16, 4, 1)],  # only the last chunk samples
    ]
    finish_all(engine)


def test_decoding_rows_come_first_and_prompts_share_what_is_left() -> None:
    engine = Engine(max_num_batched_tokens=10)
    engine.add(make_request(4, handle=1, max_tokens=10))
    engine.step()
    engine.add(make_request([9] * 20, handle=2))
    plan = engine.step()
    assert chunks_of(plan) == [(1, 0, 9, 0)]  # ten less the one token of the decoding row
    assert plan is not None and plan.max_len == 9
    finish_all(engine)


def test_several_prompts_fit_one_step() -> None:
    engine = Engine(max_num_batched_tokens=16, enable_prefix_caching=False)
    for handle in (1, 2, 3):
        engine.add(make_request(6, handle=handle))
    assert chunks_of(engine.step()) == [(0, 0, 6, 1), (1, 0, 6, 1), (2, 0, 4, 0)]
    assert chunks_of(engine.step()) == [(2, 4, 2, 1)]
    finish_all(engine)


def test_no_step_exceeds_the_budget() -> None:
    engine = Engine(max_num_batched_tokens=9, max_num_seqs=4)
    for handle in range(1, 8):
        engine.add(make_request(3 * handle, handle=handle, max_tokens=6))
    while engine.scheduler.has_unfinished():
        decoding = int(np.count_nonzero(engine.scheduler.rows.state == RowState.DECODE))
        plan = engine.step()
        assert decoding + sum(length for _, _, length, _ in chunks_of(plan)) <= 9
    engine.check_streams()


def test_no_more_than_max_num_seqs_run() -> None:
    engine = Engine(max_num_seqs=2)
    for handle in (1, 2, 3):
        engine.add(make_request(4, handle=handle))
    engine.step()
    assert engine.scheduler.rows.num_running == 2
    assert len(engine.scheduler.waiting) == 1
    finish_all(engine)


def test_a_long_prompt_is_cut_at_the_threshold_so_that_short_ones_pass() -> None:
    engine = Engine(long_prefill_token_threshold=8, max_num_batched_tokens=32)
    engine.add(make_request(40, handle=1))
    engine.add(make_request([90, 91, 92], handle=2))
    assert chunks_of(engine.step()) == [(0, 0, 8, 0), (1, 0, 3, 1)]
    finish_all(engine)


def test_only_so_many_long_prompts_prefill_at_a_time() -> None:
    engine = Engine(
        long_prefill_token_threshold=8, max_long_partial_prefills=1, max_num_batched_tokens=64, num_blocks=64
    )
    engine.add(make_request([5] * 30, handle=1))
    engine.add(make_request([6] * 30, handle=2))
    engine.add(make_request([7] * 5, handle=3))
    assert [a.handle for a in _plan(engine).admissions] == [1, 3]  # 2 is long and waits, 3 passes it
    rows = engine.scheduler.rows
    remaining, admitted = [int(rows.known[0] - rows.computed[0])], list[int]()
    while not admitted:
        admitted = [a.handle for a in _plan(engine).admissions]
        remaining.append(int(rows.known[0] - rows.computed[0]))
    assert admitted == [2]
    assert remaining[:-1] == [22, 14, 6]  # the first had at most a threshold left when the second came
    finish_all(engine)


def _plan(engine: Engine) -> StepPlan:
    plan = engine.step()
    assert plan is not None
    return plan


# ------------------------------------------------------------------------------------ ends


def test_a_request_ends_at_max_tokens_and_no_step_is_planned_past_it() -> None:
    engine = Engine()
    (stream,) = engine.add(make_request(5, max_tokens=3))
    assert engine.run(depth=2) == 3
    assert (len(stream.tokens), stream.finish) == (3, Finish.LENGTH)
    engine.check_streams()


def test_a_request_ends_at_max_model_len() -> None:
    engine = Engine(max_model_len=16)
    (stream,) = engine.add(make_request(12, max_tokens=100))
    finish_all(engine, depth=2)
    assert (len(stream.tokens), stream.finish) == (4, Finish.LENGTH)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_ends_at_an_end_of_sequence_token(depth: int) -> None:
    tokens = expected_tokens([1, 2, 3], 5, VOCAB_SIZE)
    engine = Engine()
    (stream,) = engine.add(make_request(3, max_tokens=20, eos_token_ids=[tokens[4]]))
    finish_all(engine, depth)
    assert (stream.tokens, stream.finish) == (tokens, Finish.EOS)


def test_min_tokens_hold_back_the_end() -> None:
    tokens = expected_tokens([1, 2, 3], 20, VOCAB_SIZE)
    engine = Engine()
    (stream,) = engine.add(make_request(3, max_tokens=20, min_tokens=10, stop_token_ids=tokens))
    finish_all(engine)
    assert (stream.tokens, stream.finish) == (tokens[:11], Finish.STOP_TOKEN)


def test_a_resumed_request_goes_on_where_it_stopped() -> None:
    done = expected_tokens([1, 2, 3], 4, VOCAB_SIZE)
    engine = Engine()
    (stream,) = engine.add(make_request(3, max_tokens=8, outputs=done))
    finish_all(engine)
    assert stream.tokens[:4] == done and len(stream.tokens) == 8


def test_started_tells_queue_and_prefill_times_once() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make_request(4, handle=1, max_tokens=2))
    engine.add(make_request(4, handle=2, max_tokens=2))
    started = []
    while engine.scheduler.has_unfinished():
        engine.launch()
        started += [o.started for _, o in engine.land().outputs if o.started is not None]
    assert [part.handle.tolist() for part in started] == [[1], [2]]
    assert started[0].queue_s.tolist() == [1.0]
    assert started[1].queue_s.tolist() == [3.0]  # it waited for the two steps of the first


# ------------------------------------------------------------------------------------ prefix cache


@pytest.mark.parametrize(("length", "hit"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8), (12, 8)])
def test_a_prompt_seen_before_is_found_up_to_its_last_full_block(length: int, hit: int) -> None:
    """The last token is always computed, for its logits: of a prompt of full blocks the last block is too."""
    engine = Engine(block_size=4)
    engine.add(make_request(length, handle=1))
    finish_all(engine)
    (stream,) = engine.add(make_request(length, handle=2))
    assert prefix_of(engine.step()) == {2: hit}
    assert stream.cached == hit
    finish_all(engine)


def test_a_prompt_is_shared_while_its_first_owner_still_runs() -> None:
    engine = Engine(block_size=4)
    engine.add(make_request(9, handle=1, max_tokens=10))
    engine.step()
    free = engine.scheduler.pool.num_free
    engine.add(make_request(9, handle=2, max_tokens=10))
    assert prefix_of(engine.step()) == {2: 8}
    assert engine.scheduler.pool.num_free == free - 1  # two shared, one of its own
    finish_all(engine)


def test_answers_are_cached_too() -> None:
    engine = Engine(block_size=4)
    (first,) = engine.add(make_request(5, handle=1, max_tokens=8))
    finish_all(engine)
    prompt = [1, 2, 3, 4, 5, *first.tokens, 9, 9, 9]
    engine.add(make_request(prompt, handle=2))
    assert prefix_of(engine.step()) == {2: 12}  # 13 tokens, of which the last was never computed
    finish_all(engine)


def test_prompts_with_another_salt_share_nothing() -> None:
    engine = Engine()
    for handle, salt in enumerate(["", "a", "b", "a"], 1):
        engine.add(make_request(12, handle=handle, cache_salt=salt))
        assert prefix_of(engine.step()) == {handle: 8 if handle == 4 else 0}
    finish_all(engine)


def test_a_request_may_choose_not_to_read_the_cache() -> None:
    engine = Engine()
    for handle in (1, 2):
        engine.add(make_request(12, handle=handle, read_prefix_cache=False))
        assert prefix_of(engine.step()) == {handle: 0}
    finish_all(engine)


def test_without_prefix_caching_nothing_is_found() -> None:
    engine = Engine(enable_prefix_caching=False)
    for handle in (1, 2):
        engine.add(make_request(12, handle=handle))
        assert prefix_of(engine.step()) == {handle: 0}
    finish_all(engine)
    assert engine.scheduler.pool.num_cached == 0


def test_a_hash_alone_is_not_trusted() -> None:
    """Were two blocks ever to have one hash, their tokens would tell them apart."""
    engine = Engine()
    one_for_all = BlockHash(bytes(16))
    engine.scheduler.hasher.extend = lambda chain, root, ids: chain.extend(  # type: ignore[method-assign, assignment]
        one_for_all for _ in range(len(ids) // 4 - len(chain))
    )
    engine.add(make_request([1] * 12, handle=1))
    engine.run()
    engine.add(make_request([2] * 12, handle=2))
    assert prefix_of(engine.step()) == {2: 0}
    finish_all(engine)


def test_the_least_recently_used_prefix_is_evicted_first_and_its_end_before_its_start() -> None:
    assert {token: _hit_after_an_eviction(token) for token in (1, 2, 3)} == {1: 12, 2: 0, 3: 8}


def _hit_after_an_eviction(token: int) -> int:
    engine = Engine(block_size=4, num_blocks=1 + 9, max_model_len=36)
    # The first prompt is used again, and so the youngest. The last needs four blocks: all of the second
    # prompt's, and one of the third's.
    for handle, prompt in enumerate([[1] * 12, [2] * 12, [3] * 12, [1] * 12, [90] * 13], 1):
        engine.add(make_request(prompt, handle=handle, max_tokens=1))
        engine.run()
    engine.add(make_request([token] * 12 + [80], handle=9, max_tokens=1))
    hit = prefix_of(engine.step())[9]
    engine.check_streams()
    return hit


def test_reset_forgets_all_and_tells_whether_all_was_free() -> None:
    engine = Engine()
    engine.add(make_request(12, handle=1, max_tokens=8))
    engine.step()
    assert not engine.scheduler.reset_prefix_cache()  # a running request holds its blocks
    assert engine.scheduler.pool.num_cached == 0
    engine.run()
    assert engine.scheduler.pool.num_cached > 0
    assert engine.scheduler.reset_prefix_cache()
    engine.add(make_request(12, handle=2))
    assert prefix_of(engine.step()) == {2: 0}
    finish_all(engine)


def test_children_share_the_blocks_of_their_prompt() -> None:
    engine = Engine(block_size=4, max_num_batched_tokens=64, max_num_seqs=4)
    engine.add(make_request(13, seeds=[1, 2, 3, 4], max_tokens=3))
    plan = engine.step()
    assert prefix_of(plan) == {1: 0, 2: 12, 3: 12, 4: 12}
    assert sum(length for _, _, length, _ in chunks_of(plan)) == 13 + 3
    pool = engine.scheduler.pool
    assert pool.num_blocks - 1 - pool.num_free == 3 + 4  # the prompt once, and a last block for each
    assert len({tuple(s.tokens) for s in engine.streams.values()}) > 1
    finish_all(engine)


# ------------------------------------------------------------------------------------ admission, preemption


def test_a_request_is_admitted_only_when_its_whole_prompt_fits() -> None:
    engine = Engine(block_size=4, num_blocks=1 + 9, max_model_len=36)
    engine.add(make_request([1] * 16, handle=1, max_tokens=3))
    engine.add(make_request([2] * 24, handle=2, max_tokens=3))  # six blocks; five are left
    engine.step()
    assert engine.scheduler.rows.num_running == 1
    finish_all(engine)


def test_a_reserve_is_kept_for_those_who_run() -> None:
    """One block for every block_size running requests: that many cross a block boundary in a step."""
    engine = Engine(block_size=2, num_blocks=1 + 12, max_model_len=24, max_num_seqs=8)
    for handle in (1, 2, 3, 4):
        engine.add(make_request([handle] * 3, handle=handle, max_tokens=1))
    engine.add(make_request([9] * 5, handle=9, max_tokens=1))  # three blocks of four, less a reserve of two
    plan = engine.step()
    assert plan is not None
    assert [admission.handle for admission in plan.admissions] == [1, 2, 3, 4]
    finish_all(engine)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_last_to_arrive_is_preempted_and_resumes_unharmed(depth: int) -> None:
    engine = Engine(block_size=4, num_blocks=1 + 6, max_model_len=24)
    for handle in (1, 2):
        engine.add(make_request([handle] * 6, handle=handle, max_tokens=16))
    victims = set()
    while engine.scheduler.has_unfinished():
        while len(engine.in_flight) < depth and engine.launch() is not None:
            pass
        victims |= {r.handle for r in engine.scheduler.waiting if r.num_preemptions}
        engine.land()
    assert victims == {2}
    assert engine.scheduler.counters.num_preemptions >= 1
    assert engine.scheduler.counters.recomputed_tokens > 0
    engine.check_streams()


def test_tokens_in_flight_for_a_preempted_request_count() -> None:
    engine = Engine(block_size=4, num_blocks=1 + 6, max_model_len=24)
    for handle in (1, 2):
        engine.add(make_request([handle] * 6, handle=handle, max_tokens=16))
    while not engine.scheduler.draining:
        if len(engine.in_flight) == 2:
            engine.land()
        engine.launch()
    request = next(iter(engine.scheduler.draining.values()))
    before = len(request.token_ids)
    assert engine.scheduler.is_unfinished(request)
    while engine.scheduler.draining:
        assert request.row < 0, "admitted again while its results are in flight"
        engine.land()
    assert len(request.token_ids) > before
    finish_all(engine, depth=2)


def test_fcfs_serves_in_order_of_arrival() -> None:
    engine = Engine(max_num_seqs=1)
    for handle, priority in ((1, 5), (2, 0), (3, -5)):
        engine.add(make_request(4, handle=handle, priority=priority, max_tokens=2))
    assert _order(engine) == [1, 2, 3]


def test_priority_serves_the_lowest_number_first_then_by_arrival() -> None:
    engine = Engine(max_num_seqs=1, policy="priority")
    for handle, priority in ((1, 5), (2, 0), (3, -5), (4, 0)):
        engine.add(make_request(4, handle=handle, priority=priority, max_tokens=2))
    assert _order(engine) == [3, 2, 4, 1]


def _order(engine: Engine) -> list[int]:
    order = []
    while engine.scheduler.has_unfinished():
        order += [a.handle for a in _plan(engine).admissions]
    engine.check_streams()
    return order


def test_under_priority_the_least_urgent_is_preempted() -> None:
    engine = Engine(block_size=4, num_blocks=1 + 6, max_model_len=24, policy="priority")
    engine.add(make_request([1] * 6, handle=1, max_tokens=16, priority=3))
    engine.add(make_request([2] * 6, handle=2, max_tokens=16, priority=1))
    while not engine.scheduler.counters.num_preemptions:
        engine.step()
    assert [request.handle for request in engine.scheduler.waiting] == [1]
    finish_all(engine)


# ------------------------------------------------------------------------------------ aborts


def test_aborted_while_waiting() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make_request(4, handle=1))
    engine.add(make_request(4, handle=2))
    engine.step()
    engine.abort(2)
    finish_all(engine)
    assert engine.scheduler.counters.num_aborted == 1


def test_aborted_in_prefill_leaves_no_chunk_behind() -> None:
    engine = Engine(max_num_batched_tokens=8)
    engine.add(make_request(40, handle=1))
    engine.step()
    engine.abort(1)
    engine.check_empty()
    assert engine.step() is None
    engine.add(make_request(40, handle=2))
    plan = engine.step()
    assert plan is not None and plan.releases is not None
    assert plan.releases.tolist() == [0]
    finish_all(engine)


@pytest.mark.parametrize("in_flight", [0, 1, 2, 3])
def test_aborted_while_decoding_with_steps_in_flight(in_flight: int) -> None:
    engine = Engine()
    engine.add(make_request(4, handle=1, max_tokens=20))
    engine.add(make_request([9] * 4, handle=2, max_tokens=20))
    engine.step()
    for _ in range(in_flight):
        engine.launch()
    engine.abort(1)
    assert engine.scheduler.rows.state[0] == FREE
    finish_all(engine, depth=2)
    assert engine.streams[1, 1].finish is Finish.NONE  # its frontend closed the stream itself


def test_aborted_when_all_its_tokens_are_planned() -> None:
    engine = Engine()
    engine.add(make_request(4, handle=1, max_tokens=2))
    engine.launch()
    engine.launch()
    assert engine.scheduler.rows.state[0] == RowState.HELD
    engine.abort(1)
    finish_all(engine)


def test_aborted_while_its_last_tokens_drain_after_a_preemption() -> None:
    engine = Engine(block_size=4, num_blocks=1 + 6, max_model_len=24)
    for handle in (1, 2):
        engine.add(make_request([handle] * 6, handle=handle, max_tokens=16))
    while not engine.scheduler.draining:
        if len(engine.in_flight) == 2:
            engine.land()
        engine.launch()
    engine.abort(2)
    finish_all(engine, depth=2)


def test_aborting_twice_or_what_is_unknown_or_ended_is_harmless() -> None:
    engine = Engine()
    engine.add(make_request(4, handle=1, max_tokens=1))
    engine.step()
    for handle in (1, 1, 77):
        engine.abort(handle)
    finish_all(engine)
    assert engine.scheduler.counters.num_aborted == 0


def test_a_stop_string_counts_as_finished() -> None:
    engine = Engine()
    engine.add(make_request(4, handle=1, max_tokens=10))
    engine.step()
    engine.scheduler.abort(1, [1], stopped=True)
    assert (engine.scheduler.counters.num_finished, engine.scheduler.counters.num_aborted) == (1, 0)
    engine.check_empty()


def test_a_frontend_that_leaves_takes_only_its_own_requests() -> None:
    engine = Engine(max_num_seqs=2)
    for frontend in (1, 2):
        for handle in (1, 2, 3):  # handles are unique per frontend only
            engine.add(make_request([frontend, handle, 3], handle=handle, max_tokens=6), frontend=frontend)
    engine.step()
    assert engine.scheduler.abort_frontend(1) == 3
    for handle in (1, 2, 3):
        engine.streams[1, handle].aborted = True
    finish_all(engine, depth=2)
    assert all(len(engine.streams[2, handle].tokens) == 6 for handle in (1, 2, 3))


# ------------------------------------------------------------------------------------ pauses


def test_keep_freezes_and_goes_on() -> None:
    engine = Engine()
    (stream,) = engine.add(make_request(4, max_tokens=10))
    engine.step()
    engine.pause(PauseMode.KEEP)
    assert engine.step() is None and engine.scheduler.at_rest
    engine.scheduler.paused = None
    finish_all(engine)
    assert len(stream.tokens) == 10


def test_keep_with_a_cleared_cache_recomputes() -> None:
    engine = Engine()
    engine.add(make_request(9, max_tokens=10))
    engine.step()
    engine.pause(PauseMode.KEEP)
    assert engine.clear_cache_at_rest()
    engine.scheduler.paused = None
    assert prefix_of(engine.step()) == {1: 0}
    finish_all(engine)


def test_wait_lets_what_has_started_finish_and_holds_the_rest() -> None:
    engine = Engine(max_num_seqs=1)
    first, second = (engine.add(make_request(4, handle=h, max_tokens=5))[0] for h in (1, 2))
    engine.step()
    engine.pause(PauseMode.WAIT)
    assert not engine.scheduler.at_rest
    while engine.step() is not None:
        pass
    assert engine.scheduler.at_rest
    assert (len(first.tokens), len(second.tokens)) == (5, 0)
    engine.scheduler.paused = None
    finish_all(engine)


def test_wait_lets_what_was_preempted_finish_too() -> None:
    engine = Engine(block_size=4, num_blocks=1 + 6, max_model_len=24)
    for handle in (1, 2):
        engine.add(make_request([handle] * 6, handle=handle, max_tokens=16))
    while not engine.scheduler.counters.num_preemptions:
        engine.step()
    engine.pause(PauseMode.WAIT)
    engine.add(make_request(3, handle=3))
    while engine.step() is not None:
        pass
    assert engine.scheduler.at_rest
    assert [request.handle for request in engine.scheduler.waiting] == [3]
    engine.scheduler.paused = None
    finish_all(engine)


def test_abort_ends_all_and_queues_what_comes() -> None:
    engine = Engine()
    first = engine.add(make_request(4, handle=1, max_tokens=10))[0]
    engine.step()
    engine.launch()
    engine.pause(PauseMode.ABORT)
    assert first.finish is Finish.ABORT
    second = engine.add(make_request(4, handle=2))[0]
    assert engine.launch() is None
    engine.land()
    assert engine.scheduler.at_rest and not second.tokens
    engine.scheduler.paused = None
    finish_all(engine)


# ------------------------------------------------------------------------------------ results


def test_a_failing_row_fails_alone_and_its_blocks_are_never_found_again() -> None:
    engine = Engine()
    bad = engine.add(make_request(9, handle=1, logprobs=1))[0]  # which the simulated model has not
    good = engine.add(make_request([5] * 9, handle=2, max_tokens=5))[0]
    finish_all(engine, depth=2)
    assert bad.finish is Finish.ERROR and "log-probabilities" in bad.failed
    assert len(good.tokens) == 5
    engine.add(make_request(9, handle=3))
    assert prefix_of(engine.step()) == {3: 0}
    finish_all(engine)


def test_results_of_an_earlier_owner_of_a_row_are_dropped() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add(make_request(4, handle=1, max_tokens=10))
    engine.launch()
    engine.launch()
    engine.abort(1)
    second = engine.add(make_request([7] * 4, handle=2, max_tokens=3))[0]
    engine.launch()
    assert engine.scheduler.rows.requests[0] is not None  # the row is taken again, with results in flight
    finish_all(engine, depth=3)
    assert len(second.tokens) == 3


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": 2}, "expected 1"),
        ({"row": [99]}, "does not exist"),
        ({"row": [-1]}, "does not exist"),
        ({"token": [1, 2]}, "different lengths"),
    ],
)
def test_a_result_that_contradicts_the_plan_is_the_workers_fault(
    change: dict[str, Any], problem: str
) -> None:
    engine = Engine()
    engine.add(make_request(4))
    engine.launch()
    zero = np.zeros(1, np.int32)
    result = StepResult(epoch=1, step=1, row=zero, gen=zero, token=zero, finish=np.zeros(1, np.uint8))
    changes = {k: np.array(v, np.int32) if isinstance(v, list) else v for k, v in change.items()}
    result = msgspec.structs.replace(result, **changes)
    with pytest.raises(ResultError, match=problem):
        apply_result(engine.scheduler, result, 0.0)


def test_a_result_is_split_by_frontend() -> None:
    engine = Engine()
    for frontend in (1, 2):
        for handle in (1, 2):
            engine.add(make_request([frontend, handle], handle=handle), frontend=frontend)
    engine.launch()
    outputs = dict(engine.land().outputs)
    assert {frontend: message.handle.tolist() for frontend, message in outputs.items()} == {
        1: [1, 2],
        2: [1, 2],
    }
    finish_all(engine)


def test_the_oracle_knows_a_wrong_stream() -> None:
    """`check_streams` itself: a stream with a token changed does not pass."""
    engine = Engine()
    (stream,) = engine.add(make_request(4))
    engine.run()
    assert isinstance(stream, Stream)
    stream.tokens[1] = (stream.tokens[1] + 1) % VOCAB_SIZE
    with pytest.raises(AssertionError, match="wrong tokens"):
        engine.check_streams()
