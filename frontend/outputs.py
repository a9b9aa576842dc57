"""What a user gets back, under vLLM's names.

The objects are plain data, made when a consumer takes them. They hold no reference cycles, so the garbage
collector need not look at them (`gc=False`): at thousands of them a second its pauses would show.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from tercet.frontend.flat_logprobs import PromptLogprobs, SampleLogprobs

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


class CompletionOutput(msgspec.Struct, gc=False):
    """One completion of a request.

    Attributes:
        index: which of the request's n completions.
        text: generated text; in a DELTA stream what is new.
        token_ids: generated tokens, an end-of-sequence token included; in a DELTA stream what is new.
        cumulative_logprob: sum over all tokens generated so far; None unless logprobs were asked for.
        logprobs: one entry per token of `token_ids`; None unless asked for.
        finish_reason: 'stop', 'length', 'abort' or 'error'; None while generation goes on.
        stop_reason: the stop string or stop token id that ended it; None for an end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestStateStats(msgspec.Struct, gc=False):
    """Times of one request. It is one object for all outputs of a stream, and grows with it.

    Attributes:
        arrival_time: time.time() when the request came.
        num_generation_tokens: over all completions.
        queue_s: from its arrival at the core to its first step.
        prefill_s: from its first step to its first token.
        first_token_latency: from arrival to the first token here, seconds; 0 before.
        e2e_latency: from arrival to the end, seconds; 0 before.
    """

    arrival_time: float
    num_generation_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    first_token_latency: float = 0.0
    e2e_latency: float = 0.0


class RequestOutput(msgspec.Struct, gc=False):
    """State or progress of one request.

    Attributes:
        request_id: as given, or as drawn for the caller.
        prompt: its text; None where token ids were given.
        prompt_token_ids: the prompt as the model sees it.
        prompt_logprobs: None unless asked for; a DELTA stream has it in its first output only.
        outputs: completions, by index. A DELTA stream has those that have something new.
        finished: whether every completion is finished.
        metrics: times of this request.
        num_cached_tokens: prompt tokens found in the prefix cache; None before the first token.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStateStats | None = None
    num_cached_tokens: int | None = None

    def add(self, next_output: RequestOutput, aggregate: bool) -> None:
        """Merge the stream's next output into this one.

        Args:
            next_output: of the same request.
            aggregate: True appends what is new (DELTA), False replaces (CUMULATIVE).
        """
        self.finished = self.finished or next_output.finished
        self.metrics = next_output.metrics
        self.num_cached_tokens = next_output.num_cached_tokens
        self.prompt_logprobs = next_output.prompt_logprobs or self.prompt_logprobs
        mine = {completion.index: completion for completion in self.outputs}
        for completion in next_output.outputs:
            known = mine.get(completion.index)
            mine[completion.index] = _joined(known, completion) if known and aggregate else completion
        self.outputs = [mine[index] for index in sorted(mine)]


def _joined(first: CompletionOutput, second: CompletionOutput) -> CompletionOutput:
    logprobs = None
    if first.logprobs is not None and second.logprobs is not None:
        logprobs = first.logprobs[:]
        logprobs.extend(second.logprobs)
    return CompletionOutput(
        index=first.index,
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        cumulative_logprob=second.cumulative_logprob,
        logprobs=logprobs,
        finish_reason=second.finish_reason,
        stop_reason=second.stop_reason,
    )
