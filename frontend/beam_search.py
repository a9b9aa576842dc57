"""Beam search, on this side of the wire: each step of each beam is a request for one token.

The prefix cache makes that affordable: a step computes one token per beam anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from tercet.errors import ValidationError
from tercet.frontend.async_llm import AsyncLLM, NewRequest
from tercet.frontend.flat_logprobs import Logprob
from tercet.frontend.inputs import PromptType, TokensPrompt, parse_prompt
from tercet.frontend.outputs import FinishReason, RequestOutput
from tercet.frontend.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams


class BeamSearchSequence(msgspec.Struct):
    """One result.

    Attributes:
        tokens: prompt and output.
        logprobs: one entry per output token.
        cum_logprob: sum over the output tokens.
        text: of `tokens`; None without a tokenizer.
        finish_reason: 'stop' at an end-of-sequence token (`stop_reason` names it), else 'length'.
    """

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class BeamSearchOutput(msgspec.Struct):
    """Results for one prompt, best first."""

    prompt_token_ids: list[int]
    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Search:
    engine: AsyncLLM
    params: BeamSearchParams
    num_prompt_tokens: int
    cache_salt: str

    def score(self, beam: BeamSearchSequence) -> float:
        """Log-probability over length ** length_penalty (Wu et al. 2016, section 7, less its constants)."""
        length = len(beam.tokens) - self.num_prompt_tokens
        if beam.finish_reason == "stop" and not self.params.include_stop_str_in_output:
            length += 1  # its end-of-sequence token was scored, though it is not shown
        return beam.cum_logprob / math.pow(max(1, length), self.params.length_penalty)

    def best(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(beams, key=self.score, reverse=True)[: self.params.beam_width]


async def beam_search(engine: AsyncLLM, prompt: PromptType, params: BeamSearchParams) -> BeamSearchOutput:
    """The `beam_width` likeliest continuations of a prompt.

    Raises:
        ValidationError: a field is wrong; the engine's max_logprobs must be at least 2 × beam_width.
    """
    if not isinstance(params, BeamSearchParams):
        raise ValidationError("params", f"must be BeamSearchParams; got {type(params).__name__}")
    await engine.start()
    if 2 * params.beam_width > engine.limits.max_logprobs:
        fix = f"raise max_logprobs to {2 * params.beam_width}, or lower beam_width"
        raise ValidationError(
            "beam_width", f"needs an engine with more than {engine.limits.max_logprobs}: {fix}"
        )
    parsed = parse_prompt(prompt)
    tokens = await engine.tokenize(prompt)
    search = _Search(engine, params, len(tokens), parsed.cache_salt)
    beams = [BeamSearchSequence(tokens, [])]
    completed: list[BeamSearchSequence] = []
    for _ in range(min(params.max_tokens, engine.model_info.max_model_len - len(tokens))):
        live = await _step(search, beams, completed)
        beams = search.best(live)
        if not beams:
            break
    for beam in beams:
        beam.finish_reason = "length"
    results = search.best(completed + beams)
    await _add_texts(engine, params, results)
    return BeamSearchOutput(tokens, results)


async def _step(
    search: _Search, beams: list[BeamSearchSequence], completed: list[BeamSearchSequence]
) -> list[BeamSearchSequence]:
    """Extend every beam by its likeliest tokens; those that end go to `completed`, others are returned."""
    outputs = await _next_tokens(search, beams)
    params, eos = search.params, search.engine.model_info.eos_token_ids
    live: list[BeamSearchSequence] = []
    for beam, output in zip(beams, outputs, strict=True):
        entries = output.outputs[0].logprobs
        assert entries is not None
        for token, logprob in entries[0].items():
            ended = token in eos and not params.ignore_eos
            grown = BeamSearchSequence(
                tokens=beam.tokens
                if ended and not params.include_stop_str_in_output
                else [*beam.tokens, token],
                logprobs=[*beam.logprobs, entries[0]],
                cum_logprob=beam.cum_logprob + logprob.logprob,
                finish_reason="stop" if ended else None,
                stop_reason=token if ended else None,
            )
            (completed if ended else live).append(grown)
    return live


async def _next_tokens(search: _Search, beams: list[BeamSearchSequence]) -> list[RequestOutput]:
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        logprobs=2 * search.params.beam_width,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    requests = []
    for beam in beams:
        prompt = TokensPrompt(prompt_token_ids=beam.tokens)
        if search.cache_salt:
            prompt["cache_salt"] = search.cache_salt
        requests.append(NewRequest(prompt, params))
    streams = await search.engine.add_requests(requests)
    try:
        return [await stream.get() for stream in streams]
    finally:
        for stream in streams:
            stream.close()


async def _add_texts(engine: AsyncLLM, params: BeamSearchParams, sequences: list[BeamSearchSequence]) -> None:
    if engine.has_tokenizer:
        tokenizer = await engine.get_tokenizer()
        for sequence in sequences:
            sequence.text = tokenizer.decode(sequence.tokens, skip_special_tokens=params.skip_special_tokens)
