"""What a user asks of one generation: `SamplingParams`, under vLLM's names, defaults and meanings.

Values are checked when the object is made and again at the front door (`validate`), for a user may change a
field in between. What depends on the model (vocabulary, context length) is the input processor's to check.
"""

from __future__ import annotations

import enum
from typing import Any, Final

import msgspec

from tercet import sampling_ranges as ranges
from tercet.errors import ValidationError
from tercet.frontend import validation as v

GREEDY_TEMPERATURE: Final = 1e-5  # below this, argmax
MIN_TEMPERATURE: Final = 1e-2  # raised to this, lest logits / temperature overflow


class RequestOutputKind(enum.IntEnum):
    """What each `RequestOutput` of a stream holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # one output, when the request is finished


class SamplingParams(msgspec.Struct, kw_only=True, repr_omit_defaults=True):
    """How to generate, in vLLM's names.

    Attributes:
        n: completions per prompt, 1 to 16384; 1 where sampling is greedy.
        presence_penalty, frequency_penalty: [-2, 2], subtracted from logits of tokens already generated.
        repetition_penalty: [0.001, 1000]; logits of tokens in prompt and output are divided (or multiplied) by it.
        temperature: [0, 2]. Below 1e-5 is greedy (top_p, top_k and min_p then have no effect);
            otherwise values below 0.01 are raised to 0.01.
        top_p: (0, 1].
        top_k: 0 or -1 is all.
        min_p: [0, 1], relative to the most likely token.
        seed: whole number of 64 bits; equal seeds give equal tokens. None or -1 draws one.
        stop: strings that end the completion; `stop_reason` then names the one found.
        stop_token_ids: token ids that end the completion, beside the model's own.
        ignore_eos: go on after the model's end-of-sequence token.
        max_tokens: output tokens; None is up to the context length.
        min_tokens: output tokens before anything but max_tokens may end the completion.
        logprobs: number of most likely tokens reported beside each chosen one; -1 is the whole vocabulary.
        prompt_logprobs: the same for the tokens of the prompt.
        flat_logprobs: report both as a `FlatLogprobs`, a few long lists instead of a dict per token.
        detokenize: False leaves every text empty.
        skip_special_tokens, spaces_between_special_tokens: how tokens become text.
        include_stop_str_in_output: keep the stop string (or the text of the stop token) in the text.
        output_kind: see `RequestOutputKind`.
        stream_interval: tokens between two outputs of a stream (the first comes at once); None is 1.
        logit_bias: token id -> number of [-100, 100], added to its logit.
        allowed_token_ids: no other token is generated.
        bad_words: words that are not generated.
        skip_reading_prefix_cache: compute the whole prompt; None does so only for prompt_logprobs.
        skip_clone: promise not to change this object while its request runs; saves a copy.

    The remaining fields of vLLM's are known by name, so that a request that relies on one is refused
    rather than answered wrongly.

    Raises:
        ValidationError: a field has the wrong type or range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_reading_prefix_cache: bool | None = None
    skip_clone: bool = False
    # Known by name only.
    structured_outputs: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None
    logprob_token_ids: Any = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: Any = None
    trace_decode_token_ids: Any = None
    routed_experts_prompt_start: Any = None
    watermarking: Any = None
    extra_args: Any = None

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """As the constructor, but None stands for a field's default, token ids of `logit_bias` may be
        strings, and its values are clamped to [-100, 100]. For values that come from outside, as JSON.

        Raises:
            ValidationError: a field is unknown, or has the wrong type or range.
        """
        for name in fields:
            if name not in cls.__struct_fields__:
                raise ValidationError(name, "is no field of SamplingParams")
        max_tokens_given = "max_tokens" in fields  # where None is a value: to the end of the context
        given = {name: value for name, value in fields.items() if value is not None}
        if max_tokens_given:
            given["max_tokens"] = fields["max_tokens"]
        if "logit_bias" in given:
            given["logit_bias"] = _clamped_logit_bias(given["logit_bias"])
        return cls(**given)

    def clone(self) -> SamplingParams:
        """A copy that shares nothing that can be changed; `self` where skip_clone is set."""
        if self.skip_clone:
            return self
        copy = msgspec.structs.replace(self)
        for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(copy, name, list(value))
        if self.logit_bias is not None:
            copy.logit_bias = dict(self.logit_bias)
        return copy

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def validate(self) -> None:
        """Check every field and bring it to its canonical form.

        Raises:
            ValidationError: a field has the wrong type or range.
        """
        self._check_sampling()
        self._check_length()
        self._check_stops()
        self._check_outputs()
        self._check_token_choices()
        self._check_unsupported()

    def _check_sampling(self) -> None:
        self.n = v.check_int("n", self.n, 1, v.MAX_CHILDREN)
        for name, limits in _RANGES:
            setattr(self, name, v.check_float(name, getattr(self, name), *limits))
        self.top_p = v.check_float("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ValidationError("top_p", "must be greater than 0; 1 is all tokens")
        self.top_k = max(0, v.check_int("top_k", self.top_k, -1))
        self.min_p = v.check_float("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            self.seed = v.check_int("seed", self.seed, -(2**63), v.MAX_SEED)
            self.seed = None if self.seed == -1 else self.seed
        if self.greedy:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
            if self.n > 1:
                raise ValidationError("n", f"must be 1 where temperature is 0 (greedy); got {self.n}")
        else:
            self.temperature = max(self.temperature, MIN_TEMPERATURE)

    def _check_length(self) -> None:
        self.min_tokens = v.check_int("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            self.max_tokens = v.check_int("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                problem = f"must be at most max_tokens ({self.max_tokens}); got {self.min_tokens}"
                raise ValidationError("min_tokens", problem)
        v.check_bool("ignore_eos", self.ignore_eos)

    def _check_stops(self) -> None:
        v.check_bool("detokenize", self.detokenize)
        v.check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        if self.stop is not None:
            if not isinstance(self.stop, (str, list, tuple)):
                raise ValidationError(
                    "stop", f"must be a string or a list of strings; got {v.shown(self.stop)}"
                )
            stops = (
                [self.stop]
                if isinstance(self.stop, str)
                else v.check_list("stop", self.stop, v.MAX_STOP_STRINGS)
            )
            self.stop = [v.check_str("stop", text, v.MAX_STOP_STRING_CHARS) for text in stops]
            if self.stop and not self.detokenize:
                raise ValidationError("stop", "needs detokenize=True: stop strings are found in the text")
        if self.stop_token_ids is not None:
            ids = v.check_int_list("stop_token_ids", self.stop_token_ids, v.MAX_STOP_TOKEN_IDS)
            self.stop_token_ids = list(dict.fromkeys(ids))

    def _check_outputs(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, v.check_int(name, value, -1))
        v.check_bool("flat_logprobs", self.flat_logprobs)
        v.check_bool("skip_special_tokens", self.skip_special_tokens)
        v.check_bool("spaces_between_special_tokens", self.spaces_between_special_tokens)
        v.check_bool("skip_clone", self.skip_clone)
        if self.skip_reading_prefix_cache is not None:
            v.check_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        if self.stream_interval is not None:
            self.stream_interval = v.check_int("stream_interval", self.stream_interval, 1)
        kind = v.check_int("output_kind", self.output_kind, 0, len(RequestOutputKind) - 1)
        self.output_kind = RequestOutputKind(kind)

    def _check_token_choices(self) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict) or len(self.logit_bias) > v.MAX_LOGIT_BIASES:
                problem = (
                    f"must be a dict of at most {v.MAX_LOGIT_BIASES} entries; got {v.shown(self.logit_bias)}"
                )
                raise ValidationError("logit_bias", problem)
            self.logit_bias = {
                v.check_int("logit_bias", token_id, 0): v.check_float(
                    f"logit_bias[{token_id}]", bias, *ranges.LOGIT_BIAS
                )
                for token_id, bias in self.logit_bias.items()
            }
        if self.allowed_token_ids is not None:
            ids = v.check_int_list("allowed_token_ids", self.allowed_token_ids, v.MAX_INT32)
            if not ids:
                raise ValidationError("allowed_token_ids", "must not be empty; None allows every token")
            self.allowed_token_ids = list(dict.fromkeys(ids))
        if self.bad_words is not None:
            words = v.check_list("bad_words", self.bad_words, v.MAX_BAD_WORDS)
            self.bad_words = [v.check_str("bad_words", word, v.MAX_BAD_WORD_CHARS) for word in words]

    def _check_unsupported(self) -> None:
        for name in _UNSUPPORTED:
            value = getattr(self, name)
            if value is not None and value is not False and value != {}:
                raise ValidationError(name, f"is not supported yet; leave it unset (got {v.shown(value)})")


_RANGES: Final = (
    ("presence_penalty", ranges.PENALTY),
    ("frequency_penalty", ranges.PENALTY),
    ("repetition_penalty", ranges.REPETITION_PENALTY),
    ("temperature", ranges.TEMPERATURE),
)

_UNSUPPORTED: Final = (
    "structured_outputs",
    "thinking_token_budget",
    "repetition_detection",
    "logprob_token_ids",
    "prompt_logprob_token_ids",
    "prompt_logprob_start",
    "trace_decode_token_ids",
    "routed_experts_prompt_start",
    "watermarking",
    "extra_args",
)


class BeamSearchParams(msgspec.Struct, kw_only=True, repr_omit_defaults=True):
    """Parameters of `LLM.beam_search`.

    Attributes:
        beam_width: hypotheses kept at each step, and results returned.
        max_tokens: output tokens.
        ignore_eos: go on after the end-of-sequence token.
        temperature: 0 only: beams are scored by the model's own log-probabilities.
        length_penalty: scores are divided by length ** length_penalty; above 1 favours long results.
        include_stop_str_in_output: keep the end-of-sequence token in tokens and text.
        skip_special_tokens: how tokens become text.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.beam_width = v.check_int("beam_width", self.beam_width, 1, 1024)
        self.max_tokens = v.check_int("max_tokens", self.max_tokens, 1)
        self.temperature = v.check_float("temperature", self.temperature, 0, 2)
        if self.temperature:
            raise ValidationError(
                "temperature", "beam search scores unscaled log-probabilities; leave it at 0"
            )
        self.length_penalty = v.check_float("length_penalty", self.length_penalty, -10, 10)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            v.check_bool(name, getattr(self, name))


def _clamped_logit_bias(logit_bias: Any) -> dict[int, float]:
    if not isinstance(logit_bias, dict):
        raise ValidationError(
            "logit_bias", f"must be a dict of token id to number; got {v.shown(logit_bias)}"
        )
    clamped: dict[int, float] = {}
    for key, bias in logit_bias.items():
        try:
            token_id = int(key)
        except (TypeError, ValueError):
            raise ValidationError("logit_bias", f"keys must be token ids; got {v.shown(key)}") from None
        number = v.check_float(f"logit_bias[{token_id}]", bias)
        low, high = ranges.LOGIT_BIAS
        clamped[token_id] = min(high, max(low, number))
    return clamped
