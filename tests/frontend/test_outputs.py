"""Outputs as plain data: merging, and the names that vLLM's users know."""

from __future__ import annotations

from tercet import CompletionOutput, Logprob, RequestOutput


def output(index: int, text: str, ids: list[int], finished: bool = False) -> RequestOutput:
    completion = CompletionOutput(index, text, ids, None, [{i: Logprob(-1.0)} for i in ids])
    if finished:
        completion.finish_reason = "stop"
    return RequestOutput("r", "p", [1], None, [completion], finished)


def test_fields_have_vllms_names() -> None:
    assert RequestOutput.__struct_fields__[:6] == (
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
    )
    assert CompletionOutput.__struct_fields__ == (
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    )


def test_adding_deltas() -> None:
    merged = output(0, "a", [1])
    merged.add(output(1, "x", [5]), aggregate=True)
    merged.add(output(0, "b", [2], finished=True), aggregate=True)
    assert [(c.index, c.text, c.token_ids) for c in merged.outputs] == [(0, "ab", [1, 2]), (1, "x", [5])]
    assert merged.outputs[0].logprobs == [{1: Logprob(-1.0)}, {2: Logprob(-1.0)}]
    assert merged.outputs[0].finished()
    assert merged.finished


def test_adding_cumulative_outputs() -> None:
    merged = output(0, "a", [1])
    merged.add(output(0, "ab", [1, 2]), aggregate=False)
    assert [(c.text, c.token_ids) for c in merged.outputs] == [("ab", [1, 2])]
