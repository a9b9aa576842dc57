"""Log-probabilities in columns say what the list of dicts says."""

from __future__ import annotations

import dataclasses
import gc

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tercet import CompletionOutput, FlatLogprobs, Logprob, RequestOutput, RequestOutputKind
from tercet.frontend.logprobs import LogprobsReader
from tercet.ipc.messages import PromptLogprobs
from tests.frontend.fake_core import logprob_columns, step_outputs
from tests.frontend.text_engine import Requests, ids_of, make_tokenizer

entries = st.builds(
    Logprob,
    st.floats(-50, 0),
    st.one_of(st.none(), st.integers(1, 9)),
    st.one_of(st.none(), st.text(max_size=3)),
)
positions = st.lists(st.dictionaries(st.integers(0, 99), entries, max_size=4), max_size=8)
bounds = st.one_of(st.none(), st.integers(-10, 10))


def flat_of(dicts: list[dict[int, Logprob]]) -> FlatLogprobs:
    flat = FlatLogprobs()
    flat.extend(dicts)
    return flat


@given(positions, bounds, bounds, st.sampled_from([None, 1, 2, 3, -1, -2]))
def test_it_is_a_sequence_of_dicts(
    dicts: list[dict[int, Logprob]], start: int | None, stop: int | None, step: int | None
) -> None:
    flat = flat_of(dicts)
    assert list(flat) == dicts
    assert [flat[i] for i in range(len(flat))] == dicts
    part = flat[start:stop:step]
    assert isinstance(part, FlatLogprobs)
    assert list(part) == dicts[start:stop:step]
    assert list(reversed(flat)) == dicts[::-1]
    with pytest.raises(IndexError):
        flat[len(dicts)]
    assert part.end_indices[-1:] == ([len(part.token_ids)] if part else [])


@given(positions, positions)
def test_extended_by_columns_or_dicts_it_is_the_same(
    first: list[dict[int, Logprob]], second: list[dict[int, Logprob]]
) -> None:
    by_columns, by_dicts = flat_of(first), flat_of(first)
    by_columns.extend(flat_of(second))
    by_dicts.extend(second)
    assert by_columns == by_dicts == flat_of(first + second)


def test_columns_hold_no_object_per_token() -> None:
    flat = flat_of([{token: Logprob(-1.0, 1, "x") for token in range(20)} for _ in range(100)])
    columns = [getattr(flat, field.name) for field in dataclasses.fields(flat)]
    assert not any(gc.is_tracked(value) for column in columns for value in column)
    assert [len(column) for column in columns] == [100, 100, 2000, 2000, 2000, 2000]


def test_outputs_with_columns_become_json() -> None:
    flat = flat_of([{7: Logprob(-0.5, 1, "a")}])
    text = msgspec.json.encode(CompletionOutput(0, "a", [7], -0.5, flat))
    assert b'"token_ids":[7],"logprobs":[-0.5],"ranks":[1],"decoded_tokens":["a"]' in text


@pytest.mark.parametrize("kind", RequestOutputKind)
@pytest.mark.parametrize("stop", [None, "b"])
def test_outputs_equal_those_in_dicts(kind: RequestOutputKind, stop: str | None) -> None:
    outputs: dict[bool, list[RequestOutput]] = {}
    for is_flat in (False, True):
        requests = Requests(make_tokenizer())
        request, handle = requests.add(
            [5, 6, 7], logprobs=2, prompt_logprobs=1, flat_logprobs=is_flat, output_kind=kind, stop=stop
        )
        scores = PromptLogprobs(
            key=np.array([handle], np.uint64),
            start=np.array([1], np.int32),
            offset=np.array([0, 2], np.int32),
            token_ids=np.array([[6, 6], [7, 9]], np.int32),
            logprobs=np.array([[-1.0, -1.0], [-2.0, -0.5]], np.float32),
            rank=np.array([1, 4], np.int32),
        )
        requests.outputs.apply(step_outputs({}, prompt_logprobs=scores))
        tokens = ids_of("a b c")
        taken = []
        for i, token in enumerate(tokens):
            best = [(token, -0.25), (token if i % 2 else 1, -0.25), (2, -3.0), (3, -4.0)]
            columns = logprob_columns([(handle, best, 1)])
            requests.outputs.apply(step_outputs({handle: [token]}, first=i, logprobs=columns))
            if (output := request.take()) is not None:
                taken.append(output)
        outputs[is_flat] = taken
    assert len(outputs[True]) == len(outputs[False])
    for flat, listed in zip(outputs[True], outputs[False], strict=True):
        of_flat, of_list = flat.outputs[0], listed.outputs[0]
        assert isinstance(of_flat.logprobs, FlatLogprobs) and isinstance(of_list.logprobs, list)
        assert list(of_flat.logprobs) == of_list.logprobs
        assert of_flat.cumulative_logprob == of_list.cumulative_logprob
        assert (flat.prompt_logprobs is None) == (listed.prompt_logprobs is None)
        if flat.prompt_logprobs is not None and listed.prompt_logprobs is not None:
            assert list(flat.prompt_logprobs) == [entry or {} for entry in listed.prompt_logprobs]
            assert len(flat.prompt_logprobs) == 3
    assert any(output.prompt_logprobs for output in outputs[True]) or kind is RequestOutputKind.FINAL_ONLY


def test_merged_deltas_are_joined() -> None:
    def delta(token: int) -> RequestOutput:
        flat = flat_of([{token: Logprob(-1.0, 1)}])
        return RequestOutput("r", None, [1], None, [CompletionOutput(0, "", [token], -1.0, flat)], False)

    merged, second = delta(3), delta(4)
    merged.add(second, aggregate=True)
    assert list(merged.outputs[0].logprobs or ()) == [{3: Logprob(-1.0, 1)}, {4: Logprob(-1.0, 1)}]
    assert second.outputs[0].logprobs == flat_of([{4: Logprob(-1.0, 1)}])


def scored(start: int, tokens: list[int]) -> PromptLogprobs:
    return PromptLogprobs(
        key=np.array([1], np.uint64),
        start=np.array([start], np.int32),
        offset=np.array([0, len(tokens)], np.int32),
        token_ids=np.array([[token] for token in tokens], np.int32),
        logprobs=np.full((len(tokens), 1), -1.0, np.float32),
        rank=np.ones(len(tokens), np.int32),
    )


def test_pieces_of_a_prompt_may_come_again_but_leave_no_gap() -> None:
    reader = LogprobsReader(0, None, flat=True)
    into = reader.no_prompt_entries(6)
    assert reader.prompt(scored(1, [11, 12]), 0, into, 6)
    assert reader.prompt(scored(1, [11, 12, 13]), 0, into, 6)  # after a preemption
    assert not reader.prompt(scored(5, [15]), 0, into, 6)
    assert not reader.prompt(scored(4, [14, 15, 16]), 0, into, 6)
    assert reader.prompt(scored(4, [14, 15]), 0, into, 6)
    assert [list(entry or ()) for entry in into] == [[], [11], [12], [13], [14], [15]]
