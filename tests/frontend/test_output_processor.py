"""Columns in, outputs out: order, kinds, n > 1, stop strings, log-probabilities, and messages gone wrong."""

from __future__ import annotations

import gc
from itertools import chain
from typing import Any

import msgspec
import numpy as np
import pytest

from tercet import EngineDeadError, RequestError, RequestOutput, RequestOutputKind, ValidationError
from tercet.frontend.output_processor import Child, RequestState
from tercet.ipc.messages import Finish, PromptLogprobs, Started
from tests.frontend.fake_core import logprob_columns, step_outputs
from tests.frontend.text_engine import Requests, ids_of, make_tokenizer

DELTA, CUMULATIVE, FINAL_ONLY = (
    RequestOutputKind.DELTA,
    RequestOutputKind.CUMULATIVE,
    RequestOutputKind.FINAL_ONLY,
)


def taken(request: RequestState) -> RequestOutput:
    output = request.take()
    assert output is not None
    return output


class FakeWaiter:
    def __init__(self) -> None:
        self.num_woken = 0

    def wake(self) -> None:
        self.num_woken += 1


# ---- kinds of output


def test_delta_gives_what_is_new() -> None:
    requests = Requests()
    request, handle = requests.add(output_kind=DELTA)
    assert request.take() is None
    requests.outputs.apply(step_outputs({handle: [11]}))
    first = taken(request)
    assert (first.outputs[0].token_ids, first.finished) == ([11], False)
    assert request.take() is None
    requests.outputs.apply(step_outputs({handle: [12]}, first=1, finish={handle: Finish.LENGTH}))
    last = taken(request)
    assert (last.outputs[0].token_ids, last.finished) == ([12], True)
    assert last.outputs[0].finish_reason == "length"
    assert request.take() is None
    assert not requests.outputs.requests


def test_unread_deltas_merge() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(output_kind=DELTA)
    tokens = ids_of("one two three")
    for i, token in enumerate(tokens):
        requests.outputs.apply(step_outputs({handle: [token]}, first=i))
    output = taken(request)
    assert output.outputs[0].token_ids == tokens
    assert output.outputs[0].text == "one two three"


def test_cumulative_gives_everything() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(output_kind=CUMULATIVE)
    tokens = ids_of("one two")
    texts = []
    for i, token in enumerate(tokens):
        finish = {handle: Finish.LENGTH} if i == len(tokens) - 1 else None
        requests.outputs.apply(step_outputs({handle: [token]}, first=i, finish=finish))
        output = taken(request)
        assert output.outputs[0].token_ids == tokens[: i + 1]
        texts.append(output.outputs[0].text)
    assert texts == [make_tokenizer().decode(tokens[: i + 1]) for i in range(len(tokens))]
    assert output.finished


def test_final_only_gives_one_output() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(output_kind=FINAL_ONLY)
    waiter = request.waiter = FakeWaiter()
    tokens = ids_of("one two")
    for i, token in enumerate(tokens):
        assert waiter.num_woken == 0
        assert request.take() is None
        finish = {handle: Finish.LENGTH} if i == len(tokens) - 1 else None
        requests.outputs.apply(step_outputs({handle: [token]}, first=i, finish=finish))
    assert waiter.num_woken == 1
    output = taken(request)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("one two", tokens)


def test_stream_interval_gives_the_first_token_at_once_and_then_every_third() -> None:
    requests = Requests()
    request, handle = requests.add(output_kind=DELTA, stream_interval=3)
    sizes = []
    for i in range(8):
        finish = {handle: Finish.LENGTH} if i == 7 else None
        requests.outputs.apply(step_outputs({handle: [i]}, first=i, finish=finish))
        if (output := request.take()) is not None:
            sizes.append(len(output.outputs[0].token_ids))
    assert sizes == [1, 3, 3, 1]


def test_without_detokenizing_there_is_no_text() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(detokenize=False)
    requests.outputs.apply(step_outputs({handle: ids_of("abc")}, finish={handle: Finish.LENGTH}))
    assert taken(request).outputs[0].text == ""


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("stop", [None, "never found"])
def test_text_is_the_same_however_it_is_read(kind: RequestOutputKind, stop: str | None) -> None:
    text = "Größe 世界 🙂 and so on"
    tokens = ids_of(text)
    for stride in (1, 2, 5):
        requests = Requests(make_tokenizer())
        request, handle = requests.add(output_kind=kind, stop=stop)
        parts, ids = [], []
        for i, token in enumerate(tokens):
            finish = {handle: Finish.LENGTH} if i == len(tokens) - 1 else None
            requests.outputs.apply(step_outputs({handle: [token]}, first=i, finish=finish))
            if (i % stride == 0 or finish) and (output := request.take()) is not None:
                parts.append(output.outputs[0].text)
                ids.append(output.outputs[0].token_ids)
        if kind is DELTA:
            assert "".join(parts) == text
            assert list(chain(*ids)) == tokens
        else:
            assert parts[-1] == text
            assert ids[-1] == tokens


# ---- ends


@pytest.mark.parametrize(
    ("finish", "reason", "stop_reason", "text"),
    [
        (Finish.EOS, "stop", None, "ab"),
        (Finish.STOP_TOKEN, "stop", ids_of("c")[0], "ab"),
        (Finish.LENGTH, "length", None, "abc"),
        (Finish.ABORT, "abort", None, "abc"),
    ],
)
def test_finish_reasons(finish: Finish, reason: str, stop_reason: int | None, text: str) -> None:
    for kind in RequestOutputKind:
        requests = Requests(make_tokenizer())
        request, handle = requests.add(output_kind=kind)
        tokens = [*ids_of("a"), *ids_of("b"), *ids_of("c")]
        requests.outputs.apply(step_outputs({handle: tokens}, finish={handle: finish}))
        completion = taken(request).outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == (reason, stop_reason)
        assert completion.token_ids == tokens  # the token that ended it is counted, though not shown
        assert completion.text == text


def test_stop_token_is_shown_on_request() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(include_stop_str_in_output=True)
    requests.outputs.apply(step_outputs({handle: ids_of("abc")}, finish={handle: Finish.STOP_TOKEN}))
    assert taken(request).outputs[0].text == "abc"


def test_end_without_a_token() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(output_kind=DELTA)
    requests.outputs.apply(step_outputs({handle: ids_of("a")}))
    taken(request)
    requests.outputs.apply(step_outputs({handle: []}, first=1, finish={handle: Finish.ABORT}))
    last = taken(request)
    assert (last.finished, last.outputs[0].finish_reason, last.outputs[0].token_ids) == (True, "abort", [])


def test_half_a_character_is_flushed_at_the_end() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(output_kind=DELTA)
    half = make_tokenizer().convert_tokens_to_ids("Ã")  # the byte C3, which begins a character
    assert isinstance(half, int)
    requests.outputs.apply(step_outputs({handle: [half]}))
    assert taken(request).outputs[0].text == ""
    requests.outputs.apply(step_outputs({handle: []}, first=1, finish={handle: Finish.ABORT}))
    assert taken(request).outputs[0].text == "\ufffd"


# ---- stop strings


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_stop_string_across_tokens_ends_the_request(
    kind: RequestOutputKind, chunk: int, include: bool
) -> None:
    requests = Requests(make_tokenizer())
    params = {"stop": ["STOP", "zzz"], "include_stop_str_in_output": include, "output_kind": kind}
    request, handle = requests.add(**params)
    tokens = [token for char in "go on STOP and more" for token in ids_of(char)]
    texts, ids = [], []
    for start in range(0, len(tokens), chunk):
        requests.outputs.apply(step_outputs({handle: tokens[start : start + chunk]}, first=start))
        if (output := request.take()) is not None:
            texts.append(output.outputs[0].text)
            ids.append(output.outputs[0].token_ids)
        if request.taken:
            break
    expected = "go on STOP" if include else "go on "
    assert ("".join(texts) if kind is DELTA else texts[-1]) == expected
    assert (list(chain(*ids)) if kind is DELTA else ids[-1]) == tokens[: len("go on STOP")]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "STOP")
    assert requests.aborts == [([handle], Finish.EOS)]
    assert not requests.outputs.requests


def test_no_part_of_a_stop_string_is_shown_early() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(stop="STOP", output_kind=DELTA)
    shown = []
    for i, char in enumerate("aSTOx"):
        requests.outputs.apply(step_outputs({handle: ids_of(char)}, first=i))
        shown.append(taken(request).outputs[0].text)
    assert shown == ["a", "", "", "", "STOx"]


def test_tokens_after_a_stop_string_are_dropped() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(stop="b", output_kind=DELTA)
    requests.outputs.apply(step_outputs({handle: ids_of("b")}))
    requests.outputs.apply(step_outputs({handle: ids_of("c")}, first=1))  # was on its way
    assert taken(request).outputs[0].token_ids == ids_of("b")
    assert request.take() is None


def test_stop_string_in_the_last_token_needs_no_abort() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(stop="b")
    requests.outputs.apply(step_outputs({handle: ids_of("b")}, finish={handle: Finish.LENGTH}))
    completion = taken(request).outputs[0]
    assert (completion.finish_reason, completion.stop_reason, completion.text) == ("stop", "b", "")
    assert requests.aborts == []


# ---- several completions


def test_children_are_merged_into_one_stream() -> None:
    requests = Requests()
    request, handle = requests.add(n=3, output_kind=DELTA)
    requests.outputs.apply(step_outputs({handle: [1], handle + 1: [2], handle + 2: [3]}))
    assert [(c.index, c.token_ids) for c in taken(request).outputs] == [(0, [1]), (1, [2]), (2, [3])]
    requests.outputs.apply(step_outputs({handle + 1: [4]}, first=1, finish={handle + 1: Finish.EOS}))
    output = taken(request)
    assert [(c.index, c.token_ids, c.finish_reason) for c in output.outputs] == [(1, [4], "stop")]
    assert not output.finished
    both = {handle: Finish.LENGTH, handle + 2: Finish.LENGTH}
    requests.outputs.apply(step_outputs({handle: [5], handle + 2: [6]}, first=1, finish=both))
    output = taken(request)
    assert [c.index for c in output.outputs] == [0, 2]
    assert output.finished


def test_cumulative_shows_all_children() -> None:
    requests = Requests()
    request, handle = requests.add(n=2)
    requests.outputs.apply(step_outputs({handle + 1: [2]}))
    assert [(c.index, c.token_ids) for c in taken(request).outputs] == [(0, []), (1, [2])]


def test_final_only_waits_for_all_children() -> None:
    requests = Requests()
    request, handle = requests.add(n=2, output_kind=FINAL_ONLY)
    requests.outputs.apply(step_outputs({handle + 1: [2]}, finish={handle + 1: Finish.EOS}))
    assert request.take() is None
    requests.outputs.apply(step_outputs({handle: [1]}, finish={handle: Finish.LENGTH}))
    output = taken(request)
    assert [(c.index, c.finish_reason) for c in output.outputs] == [(0, "length"), (1, "stop")]


def test_one_failed_child_fails_the_request_and_aborts_the_others() -> None:
    requests = Requests()
    request, handle = requests.add(n=3)
    requests.outputs.fail_handle(handle + 1, lambda request_id: RequestError(request_id, "broken"))
    with pytest.raises(RequestError, match="request r: broken"):
        request.take()
    assert requests.aborts == [([handle, handle + 2], Finish.ABORT)]
    requests.outputs.apply(step_outputs({handle: [1]}))  # still on its way
    with pytest.raises(RequestError):  # again, for whoever asks again
        request.take()


# ---- log-probabilities


def test_logprobs_have_the_chosen_token_first_and_are_cut_to_what_was_asked() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(logprobs=2, output_kind=DELTA)
    other, handle_of_other = requests.add(request_id="other", logprobs=0, output_kind=DELTA)
    a, b, c, d = (ids_of(char)[0] for char in "abcd")
    rows = [
        (handle, [(d, -3.0), (a, -0.1), (b, -1.0), (c, -2.0)], 4),
        (handle_of_other, [(a, -0.5), (a, -0.5), (b, -1.0), (c, -2.0)], 1),
    ]
    message = step_outputs({handle: [d], handle_of_other: [a]}, logprobs=logprob_columns(rows))
    requests.outputs.apply(message)
    completion = taken(request).outputs[0]
    assert completion.logprobs is not None
    (entry,) = completion.logprobs
    assert list(entry) == [d, a, b]
    assert [(e.rank, e.decoded_token) for e in entry.values()] == [(4, "d"), (1, "a"), (2, "b")]
    assert completion.cumulative_logprob == pytest.approx(-3.0)
    of_other = taken(other).outputs[0]
    assert of_other.logprobs is not None
    assert {token: e.rank for token, e in of_other.logprobs[0].items()} == {a: 1}


def test_logprobs_are_cut_with_the_tokens_at_a_stop_string() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(logprobs=0, stop="b")
    tokens = [ids_of(char)[0] for char in "abc"]
    columns = logprob_columns([(handle, [(token, -1.0)], 1) for token in tokens])
    requests.outputs.apply(step_outputs({handle: tokens}, logprobs=columns))
    completion = taken(request).outputs[0]
    assert completion.logprobs is not None
    assert [list(entry) for entry in completion.logprobs] == [[tokens[0]], [tokens[1]]]
    assert completion.cumulative_logprob == pytest.approx(-2.0)


def test_missing_logprobs_are_a_fault() -> None:
    requests = Requests()
    request, handle = requests.add(logprobs=1)
    requests.outputs.apply(step_outputs({handle: [5]}, offset=np.array([0, 1], np.int32)))
    with pytest.raises(RequestError, match="log-probabilities"):
        request.take()
    assert requests.aborts == [([handle], Finish.ABORT)]


def test_prompt_logprobs_come_in_pieces_and_are_shown_once_in_deltas() -> None:
    requests = Requests()
    request, handle = requests.add([5, 6, 7, 8], prompt_logprobs=1, output_kind=DELTA)

    def piece(start: int, tokens: list[int]) -> PromptLogprobs:
        return PromptLogprobs(
            key=np.array([handle], np.uint64),
            start=np.array([start], np.int32),
            offset=np.array([0, len(tokens)], np.int32),
            token_ids=np.array([[token, 9] for token in tokens], np.int32),
            logprobs=np.array([[-1.0, -0.5] for _ in tokens], np.float32),
            rank=np.array([2 for _ in tokens], np.int32),
        )

    requests.outputs.apply(step_outputs({}, prompt_logprobs=piece(1, [6])))
    requests.outputs.apply(step_outputs({}, prompt_logprobs=piece(2, [7, 8])))
    assert request.take() is None
    requests.outputs.apply(step_outputs({handle: [1]}))
    scored = taken(request).prompt_logprobs
    assert scored is not None
    assert scored[0] is None
    assert [list(entry) for entry in scored[1:] if entry is not None] == [[6, 9], [7, 9], [8, 9]]
    assert scored[1] is not None
    assert [entry.rank for entry in scored[1].values()] == [2, 1]
    requests.outputs.apply(step_outputs({handle: [2]}, first=1))
    assert taken(request).prompt_logprobs is None


# ---- times


def test_started_gives_times_and_cached_tokens() -> None:
    requests = Requests()
    request, handle = requests.add()
    started = Started(
        handle=np.array([handle], np.uint64),
        num_cached_tokens=np.array([2], np.int32),
        queue_s=np.array([0.5], np.float32),
        prefill_s=np.array([0.25], np.float32),
    )
    requests.outputs.apply(step_outputs({handle: [1]}, started=started))
    output = taken(request)
    assert output.num_cached_tokens == 2
    assert output.metrics is not None
    assert (output.metrics.queue_s, output.metrics.prefill_s) == (0.5, 0.25)
    assert output.metrics.num_generation_tokens == 1
    assert output.metrics.first_token_latency > 0


# ---- messages gone wrong


def test_tokens_that_came_before_are_dropped() -> None:
    requests = Requests()
    request, handle = requests.add()
    requests.outputs.apply(step_outputs({handle: [1]}))
    requests.outputs.apply(step_outputs({handle: [1]}))
    requests.outputs.apply(step_outputs({handle: [1, 2, 3]}))  # a merged span that overlaps
    assert taken(request).outputs[0].token_ids == [1, 2, 3]
    assert requests.outputs.num_dropped_tokens == 2


def test_an_end_repeated_with_a_known_token_is_heard() -> None:
    requests = Requests()
    request, handle = requests.add()
    requests.outputs.apply(step_outputs({handle: [1]}))
    requests.outputs.apply(step_outputs({handle: [1]}, finish={handle: Finish.LENGTH}))
    output = taken(request)
    assert (output.outputs[0].token_ids, output.finished) == ([1], True)


@pytest.mark.parametrize("tokens", [[9], [9, 10]])
def test_a_gap_fails_the_request(tokens: list[int]) -> None:
    requests = Requests()
    request, handle = requests.add()
    other, handle_of_other = requests.add(request_id="other")
    message = step_outputs({handle: tokens, handle_of_other: [1]}, first={handle: 1, handle_of_other: 0})
    requests.outputs.apply(message)
    with pytest.raises(RequestError, match="lost tokens"):
        request.take()
    assert requests.aborts == [([handle], Finish.ABORT)]
    assert taken(other).outputs[0].token_ids == [1]  # nobody else notices


@pytest.mark.parametrize(
    "column",
    [
        {"first_index": np.zeros(2, np.int32)},
        {"finish": np.zeros(0, np.uint8)},
        {"token": np.zeros(2, np.int32)},
        {"offset": np.array([0, 2], np.int32)},
        {"offset": np.array([0], np.int32)},
        {"offset": np.array([1, 1], np.int32)},
    ],
)
def test_columns_that_contradict_each_other_are_dropped(column: dict[str, Any]) -> None:
    requests = Requests()
    request, handle = requests.add()
    requests.outputs.apply(msgspec.structs.replace(step_outputs({handle: [1]}), **column))
    assert request.take() is None
    assert requests.outputs.num_malformed == 1
    requests.outputs.apply(step_outputs({handle: [1]}))
    assert taken(request).outputs[0].token_ids == [1]


def test_unknown_finish_fails_the_request() -> None:
    requests = Requests()
    request, handle = requests.add()
    requests.outputs.apply(step_outputs({handle: [1]}, finish={handle: 99}))  # type: ignore[dict-item]
    with pytest.raises(RequestError, match="unknown reason"):
        request.take()


def test_unknown_handles_are_ignored() -> None:
    requests = Requests()
    request, handle = requests.add()
    requests.outputs.apply(step_outputs({handle + 100: [1], handle: [2], 2**64 - 1: [3]}))
    assert taken(request).outputs[0].token_ids == [2]


# ---- aborts, failures, ids


def test_abort_gives_what_there_is_and_tells_the_core() -> None:
    requests = Requests(make_tokenizer())
    request, handle = requests.add(n=2, stop="xyz", output_kind=FINAL_ONLY)
    requests.outputs.apply(step_outputs({handle: ids_of("x")}))
    requests.outputs.abort(request)
    requests.outputs.abort(request)
    output = taken(request)
    assert output.finished
    assert [(c.text, c.finish_reason) for c in output.outputs] == [("x", "abort"), ("", "abort")]
    assert requests.aborts == [([handle, handle + 1], Finish.ABORT)]


def test_fail_all_gives_everyone_an_error_of_their_own() -> None:
    requests = Requests()
    first, _ = requests.add(request_id="a")
    second, _ = requests.add(request_id="b")
    waiter = first.waiter = FakeWaiter()
    requests.outputs.fail_all(EngineDeadError("gone"))
    assert waiter.num_woken == 1
    errors = []
    for request in (first, second):
        with pytest.raises(EngineDeadError, match="gone") as caught:
            request.take()
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_an_id_is_unique_among_unfinished_requests() -> None:
    requests = Requests()
    _, handle = requests.add(request_id="a")
    with pytest.raises(ValidationError, match="request_id"):
        requests.add(request_id="a")
    requests.outputs.apply(step_outputs({handle: [1]}, finish={handle: Finish.EOS}))
    requests.add(request_id="a")


def test_one_message_wakes_a_consumer_once() -> None:
    requests = Requests()
    request, handle = requests.add(n=3, output_kind=DELTA)
    waiter = request.waiter = FakeWaiter()
    requests.outputs.apply(step_outputs({handle: [1], handle + 1: [2], handle + 2: [3]}))
    assert waiter.num_woken == 1
    assert request.waiter is None


def test_a_finished_request_is_freed_without_the_garbage_collector() -> None:
    def alive() -> set[int]:
        # By type: isinstance asks objects for their __class__, and some of other libraries' answer with a warning.
        return {id(found) for found in gc.get_objects() if type(found) in (RequestState, Child)}

    gc.collect()
    others = alive()  # kept by what ran before in this process
    requests = Requests()
    request, handle = requests.add()
    gc.disable()
    try:
        requests.outputs.apply(step_outputs({handle: [1]}, finish={handle: Finish.EOS}))
        taken(request)
        assert alive() - others
        del request
        assert not alive() - others
    finally:
        gc.enable()
