"""From a prompt and parameters to a request that crosses the wire: checked, tokenized, seeded.

Everything that the core would refuse is refused here, with the field's name. `prepare` may tokenize, so event
loops run it in a thread; it is safe in several threads at once (the tokenizer releases the interpreter lock).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from tercet.errors import ValidationError
from tercet.frontend import validation as v
from tercet.frontend.detokenizer import DetokenizerFactory
from tercet.frontend.inputs import ParsedPrompt
from tercet.frontend.logprobs import LogprobsReader
from tercet.frontend.sampling_params import SamplingParams
from tercet.frontend.stop_strings import OutputText
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tercet.ipc.messages import AddRequest, Limits, ModelInfo, Sampling, Welcome

_MASK: Final = 2**64 - 1


def derive_child_seed(seed: int, index: int) -> int:
    """Seed of child `index` of a request: child 0 has the request's own, the others a hash of it.

    So a single request with the seed `derive_child_seed(s, i)` repeats child i of a request with the seed s.

    Source: the output function of SplitMix64 (Steele, Lea, Flood 2014) at seed + index × 0x9E3779B97F4A7C15.
    """
    if index == 0:
        return seed & _MASK
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(slots=True)
class PreparedRequest:
    """A request that has passed every check.

    Attributes:
        prompt: its text, if it was given as one.
        prompt_token_ids: the prompt as the model sees it.
        make_text: makes the text of one child; None where none is wanted or there is no tokenizer.
        has_stop_strings: whether a child's text may end it.
        reader, prompt_reader: of log-probabilities, where they were asked for.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    token_array: np.ndarray
    sampling: Sampling
    seeds: list[int]
    priority: int
    cache_salt: str
    read_prefix_cache: bool
    arrival_s: float
    make_text: Callable[[], OutputText] | None
    has_stop_strings: bool
    reader: LogprobsReader | None
    prompt_reader: LogprobsReader | None

    def message(self, epoch: int, handle: int, trace: str = "") -> AddRequest:
        """The wire form; `handle` is the first child's, `trace` a W3C traceparent."""
        return AddRequest(
            epoch=epoch,
            handle=handle,
            token_ids=self.token_array,
            prompt_len=len(self.token_array),
            sampling=self.sampling,
            seeds=self.seeds,
            priority=self.priority,
            cache_salt=self.cache_salt,
            arrival_s=self.arrival_s,
            read_prefix_cache=self.read_prefix_cache,
            trace=trace,
        )


class InputProcessor:
    """Checks and prepares requests for one model.

    Args:
        model, limits: from the core's Welcome.
        tokenizer: None for an engine of token ids only.
    """

    def __init__(self, model: ModelInfo, limits: Limits, tokenizer: Tokenizer | None) -> None:
        self.model = model
        self.limits = limits
        self.tokenizer = tokenizer
        self._detokenizers = DetokenizerFactory(tokenizer) if tokenizer is not None else None
        self._token_texts: dict[int, str] = {}
        self._max_prompt_chars = 0
        if tokenizer is not None:
            longest = max(map(len, tokenizer.get_vocab()), default=1)
            self._max_prompt_chars = model.max_model_len * longest

    def needs_thread(self, prompt: ParsedPrompt) -> bool:
        """Whether preparing this prompt would hold up an event loop noticeably."""
        return prompt.token_ids is None or len(prompt.token_ids) > 4096

    def prepare(
        self,
        prompt: ParsedPrompt,
        params: SamplingParams,
        *,
        arrival_s: float,
        priority: int = 0,
        add_special_tokens: bool = True,
        default_seed: int | None = None,
    ) -> PreparedRequest:
        """Check a request against the model and tokenize it.

        Args:
            prompt: of checked form.
            params: validated; not changed, and not kept.
            arrival_s: time.time() at which the request came.
            priority: lower runs earlier, under the priority policy.
            add_special_tokens: for text: add what the model expects around it.
            default_seed: where `params` has no seed; None draws one at random.

        Raises:
            ValidationError: names the field, what is wrong and what would be right.
        """
        priority = v.check_int("priority", priority, -(2**31))
        self._check_params(params)
        ids, array = self.token_ids(prompt, add_special_tokens)
        max_tokens = self.model.max_model_len - len(ids)
        if params.max_tokens is not None:
            max_tokens = min(max_tokens, params.max_tokens)
        seed = params.seed if params.seed is not None else default_seed
        seed = secrets.randbits(64) if seed is None else seed & _MASK
        return PreparedRequest(
            prompt=prompt.text,
            prompt_token_ids=ids,
            token_array=array,
            sampling=self._sampling(params, max_tokens),
            seeds=[derive_child_seed(seed, index) for index in range(params.n)],
            priority=priority,
            cache_salt=prompt.cache_salt,
            read_prefix_cache=not (params.skip_reading_prefix_cache or params.prompt_logprobs is not None),
            arrival_s=arrival_s,
            make_text=self._text_maker(params, ids),
            has_stop_strings=bool(params.stop),
            reader=self._reader(params.logprobs, params.flat_logprobs),
            prompt_reader=self._reader(params.prompt_logprobs, params.flat_logprobs),
        )

    # ---- the prompt

    def token_ids(
        self, prompt: ParsedPrompt, add_special_tokens: bool = True
    ) -> tuple[list[int], np.ndarray]:
        """The prompt as the model sees it, as a list and as i32[prompt_len].

        Raises:
            ValidationError: it is empty or too long, or holds what is no token of the model.
        """
        if prompt.token_ids is not None:
            array = self._checked_ids(prompt.token_ids)
            return array.tolist(), array
        assert prompt.text is not None
        if self.tokenizer is None:
            raise ValidationError(
                "prompt", "is text, but this engine has no tokenizer: give prompt_token_ids"
            )
        if len(prompt.text) > self._max_prompt_chars:
            problem = f"has {len(prompt.text)} characters; the context holds at most {self._max_prompt_chars}"
            raise ValidationError("prompt", problem)
        ids = self.tokenizer.encode(prompt.text, add_special_tokens=add_special_tokens)
        self._check_length("prompt", len(ids))
        array = np.asarray(ids, np.int32)
        if int(array.max()) >= self.model.vocab_size:
            problem = f"holds token {int(array.max())}, which the model lacks: is this the model's tokenizer?"
            raise ValidationError("prompt", problem)
        return ids, array

    def _check_length(self, field: str, num_tokens: int) -> None:
        most = self.model.max_model_len - 1
        if num_tokens == 0:
            raise ValidationError(field, "is empty: there must be at least one token")
        if num_tokens > most:
            problem = (
                f"has {num_tokens} tokens; at most {most} leave room for one more in the model's context"
            )
            raise ValidationError(field, problem)

    def _checked_ids(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        field, vocab_size = "prompt_token_ids", self.model.vocab_size
        self._check_length(field, len(token_ids))
        try:
            array = np.asarray(token_ids)
        except (ValueError, TypeError, OverflowError):
            array = np.empty(0)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValidationError(field, f"must be a list of integers; got {v.shown(token_ids)}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise ValidationError(field, f"token id {bad} is outside the vocabulary [0, {vocab_size})")
        return array.astype(np.int32)

    # ---- the parameters

    def _check_params(self, params: SamplingParams) -> None:
        vocab_size = self.model.vocab_size
        if params.n > self.limits.max_children:
            raise ValidationError("n", f"must be at most {self.limits.max_children} here; got {params.n}")
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(params, name)
            count = vocab_size if asked == -1 else asked
            if count is not None and count > self.limits.max_logprobs:
                fix = f"ask for at most {self.limits.max_logprobs}, or raise the engine's max_logprobs"
                raise ValidationError(name, f"{count} entries are too many; {fix}")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if ids := getattr(params, name):
                v.check_token_ids(name, ids, vocab_size)
        self._check_can_go_on(params)
        if self.tokenizer is None:
            for name in ("stop", "bad_words"):
                if getattr(params, name):
                    raise ValidationError(name, "needs a tokenizer, and this engine has none")

    def _check_can_go_on(self, params: SamplingParams) -> None:
        """Until min_tokens are there no token that ends the output may come: another one must be allowed."""
        if not params.min_tokens or not params.allowed_token_ids:
            return
        ending = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            ending.update(self.model.eos_token_ids)
        if ending.issuperset(params.allowed_token_ids):
            problem = f"holds only tokens that end the output, which min_tokens={params.min_tokens} rules out"
            raise ValidationError(
                "allowed_token_ids", f"{problem}; allow another token, or set min_tokens to 0"
            )

    def _sampling(self, params: SamplingParams, max_tokens: int) -> Sampling:
        bias = params.logit_bias or {}
        allowed = params.allowed_token_ids
        return Sampling(
            max_tokens=max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k if params.top_k < self.model.vocab_size else 0,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            min_tokens=min(params.min_tokens, max_tokens),
            eos_token_ids=[] if params.ignore_eos else self.model.eos_token_ids,
            stop_token_ids=params.stop_token_ids or [],
            logprobs=self._num_logprobs(params.logprobs),
            prompt_logprobs=self._num_logprobs(params.prompt_logprobs),
            logit_bias_ids=np.array(list(bias), np.int32) if bias else None,
            logit_bias_values=np.array(list(bias.values()), np.float32) if bias else None,
            allowed_token_ids=np.array(allowed, np.int32) if allowed else None,
            bad_words=self._bad_words(params.bad_words or []),
        )

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token sequences of words, each as it starts a text and as it follows a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            assert self.tokenizer is not None  # checked with the parameters
            bare = word.lstrip()
            for text in (bare, f" {bare}") if bare else (word,):
                if ids := self.tokenizer.encode(text, add_special_tokens=False):
                    found[tuple(ids)] = None
        if len(found) > v.MAX_BAD_WORDS:
            problem = f"make {len(found)} token sequences; at most {v.MAX_BAD_WORDS} are allowed"
            raise ValidationError("bad_words", problem)
        return [list(ids) for ids in found]

    def _num_logprobs(self, asked: int | None) -> int | None:
        return self.model.vocab_size if asked == -1 else asked

    # ---- what the way back needs

    def _reader(self, asked: int | None, flat: bool) -> LogprobsReader | None:
        count = self._num_logprobs(asked)
        if count is None:
            return None
        return LogprobsReader(count, self._token_text if self.tokenizer is not None else None, flat)

    def _token_text(self, token_id: int) -> str:
        text = self._token_texts.get(token_id)
        if text is None:
            assert self.tokenizer is not None
            text = self._token_texts[token_id] = self.tokenizer.decode(token_id)
        return text

    def _text_maker(
        self, params: SamplingParams, prompt_token_ids: list[int]
    ) -> Callable[[], OutputText] | None:
        factory = self._detokenizers
        if factory is None or not params.detokenize:
            return None
        skip, spaces = params.skip_special_tokens, params.spaces_between_special_tokens
        stop, include, min_tokens = params.stop_strings, params.include_stop_str_in_output, params.min_tokens

        def make_text() -> OutputText:
            detokenizer = factory.create(
                skip_special_tokens=skip,
                spaces_between_special_tokens=spaces,
                prompt_token_ids=prompt_token_ids,
            )
            return OutputText(detokenizer, stop, include_stop_str_in_output=include, min_tokens=min_tokens)

        return make_text


def make_processor(welcome: Welcome) -> InputProcessor:
    """Builds the tokenizer: a second or so for a large vocabulary."""
    tokenizer = None
    if welcome.files:
        tokenizer = Tokenizer(TokenizerBundle.from_files(welcome.files, welcome.model.name))
    return InputProcessor(welcome.model, welcome.limits, tokenizer)


def checked_params(params: SamplingParams) -> SamplingParams:
    """A copy of valid parameters. Raises ValidationError."""
    if not isinstance(params, SamplingParams):
        raise ValidationError("sampling_params", f"must be SamplingParams; got {type(params).__name__}")
    params = params.clone()
    params.validate()
    return params
