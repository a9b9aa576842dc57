"""What the core refuses: every number that becomes an index, size or count is checked here again.

The frontend has validated requests for its user; the core trusts no peer (R1).
"""

from __future__ import annotations

import math

import numpy as np

from tercet import sampling_ranges as ranges
from tercet.ipc.messages import AddRequest, Limits, ModelInfo, Sampling

_MAX_STOP_IDS = 1024
_MAX_BIAS = 1024
_MAX_BAD_WORDS = 128
_MAX_SALT = 1024
_U64 = 2**64


class Refused(Exception):
    """A request that the core does not take; `code` is one of FAILURE_CODES."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_request(message: AddRequest, model: ModelInfo, limits: Limits) -> None:
    """Raises Refused with the first thing that is wrong."""
    tokens = message.token_ids
    _require(tokens.dtype == np.int32 and tokens.ndim == 1, "token_ids: must be a vector of int32")
    _require(0 < message.prompt_len <= len(tokens), "prompt_len: must be in [1, number of token ids]")
    _require(
        len(tokens) < model.max_model_len, f"prompt: must leave room for a token below {model.max_model_len}"
    )
    _require(_in_vocab(tokens, model.vocab_size), f"token_ids: must be in [0, {model.vocab_size})")
    _require(1 <= len(message.seeds) <= limits.max_children, f"n: must be in [1, {limits.max_children}]")
    _require(
        len(tokens) == message.prompt_len or len(message.seeds) == 1, "n: a resumed request has one child"
    )
    _require(all(0 <= seed < _U64 for seed in message.seeds), "seed: must fit 64 bits")
    _require(0 <= message.handle <= _U64 - len(message.seeds), "handle: must fit 64 bits")
    _require(-(2**31) <= message.priority < 2**31, "priority: must fit 32 bits")
    _require(len(message.cache_salt) <= _MAX_SALT, f"cache_salt: at most {_MAX_SALT} characters")
    _check_unsupported(message)
    _check_sampling(message.sampling, model.vocab_size, limits)
    _require(
        len(tokens) < message.prompt_len + message.sampling.max_tokens,
        "max_tokens: already reached by the outputs",
    )


def _check_unsupported(message: AddRequest) -> None:
    for name in ("adapter", "multimodal", "grammar", "deadline_s", "ttl_s", "parent"):
        if getattr(message, name):
            raise Refused("unsupported", f"{name}: not supported by this engine")


def _check_sampling(s: Sampling, vocab_size: int, limits: Limits) -> None:
    _require(1 <= s.max_tokens < 2**31, "max_tokens: must be at least 1")
    _require(0 <= s.min_tokens <= s.max_tokens, "min_tokens: must be in [0, max_tokens]")
    _check_range("temperature", s.temperature, ranges.TEMPERATURE)
    _require(_finite(s.top_p) and 0 < s.top_p <= 1, "top_p: must be in (0, 1]")
    _require(_finite(s.min_p) and 0 <= s.min_p <= 1, "min_p: must be in [0, 1]")
    _require(0 <= s.top_k < 2**31, "top_k: must be at least 0")
    _check_range("repetition_penalty", s.repetition_penalty, ranges.REPETITION_PENALTY)
    _check_range("presence_penalty", s.presence_penalty, ranges.PENALTY)
    _check_range("frequency_penalty", s.frequency_penalty, ranges.PENALTY)
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(s, name)
        allowed = count is None or 0 <= count <= limits.max_logprobs
        _require(allowed, f"{name}: must be in [0, {limits.max_logprobs}]")
    _check_ids("eos_token_ids", s.eos_token_ids, vocab_size, _MAX_STOP_IDS)
    _check_ids("stop_token_ids", s.stop_token_ids, vocab_size, _MAX_STOP_IDS)
    _require(not s.logprob_token_ids, "logprob_token_ids: not supported by this engine")
    _require(len(s.bad_words) <= _MAX_BAD_WORDS, f"bad_words: at most {_MAX_BAD_WORDS} sequences")
    for word in s.bad_words:
        _require(len(word) > 0, "bad_words: an empty sequence")
        _check_ids("bad_words", word, vocab_size, _MAX_STOP_IDS)
    _check_arrays(s, vocab_size)


def _check_arrays(s: Sampling, vocab_size: int) -> None:
    allowed, ids, values = s.allowed_token_ids, s.logit_bias_ids, s.logit_bias_values
    if allowed is not None:
        _require(
            allowed.dtype == np.int32 and allowed.ndim == 1, "allowed_token_ids: must be a vector of int32"
        )
        _require(0 < len(allowed) <= vocab_size, "allowed_token_ids: must not be empty")
        _require(_in_vocab(allowed, vocab_size), f"allowed_token_ids: must be in [0, {vocab_size})")
    _require((ids is None) == (values is None), "logit_bias: ids and values must come together")
    if ids is not None and values is not None:
        _require(
            ids.dtype == np.int32 and values.dtype == np.float32, "logit_bias: must be int32 and float32"
        )
        _require(ids.ndim == 1 and ids.shape == values.shape, "logit_bias: ids and values must match")
        _require(len(ids) <= _MAX_BIAS, f"logit_bias: at most {_MAX_BIAS} entries")
        _require(_in_vocab(ids, vocab_size), f"logit_bias: ids must be in [0, {vocab_size})")
        low, high = ranges.LOGIT_BIAS
        within = bool(((values >= low) & (values <= high)).all())  # NaN is not
        _require(within, f"logit_bias: values must be in [{low:g}, {high:g}]")


def _check_ids(name: str, ids: list[int], vocab_size: int, most: int) -> None:
    _require(len(ids) <= most, f"{name}: at most {most} ids")
    _require(all(0 <= token_id < vocab_size for token_id in ids), f"{name}: must be in [0, {vocab_size})")


def _check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    low, high = limits
    _require(low <= value <= high, f"{name}: must be in [{low:g}, {high:g}]")  # NaN is not


def _in_vocab(ids: np.ndarray, vocab_size: int) -> bool:
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < vocab_size)


def _finite(value: float) -> bool:
    return math.isfinite(value)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Refused("invalid", message)
