"""What is asked: synthetic prompts of given lengths, or prompts of a file. Names and defaults are vLLM's.

A dataset makes `BenchPrompt`s; which API they are sent to is `serve`'s affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from tercet.errors import ConfigError

if TYPE_CHECKING:
    from tercet.frontend.tokenizer import Tokenizer

NAMES: Final = ("random", "sharegpt", "custom", "prefix_repetition")
_FROM_FILE: Final = ("sharegpt", "custom")
_FIT_ROUNDS: Final = 10
_CANDIDATES: Final = (
    8192  # of which tokens for random text are chosen; a whole vocabulary would take a second
)
# Bounds of the ShareGPT conversations that are used, in tokens: vLLM's, so that figures can be compared.
_SHAREGPT_MIN, _SHAREGPT_MAX_PROMPT, _SHAREGPT_MAX_TOTAL = 4, 1024, 2048


class BenchPrompt(msgspec.Struct, frozen=True):
    """One request's content.

    Attributes:
        prompt: text, or token ids.
        prompt_len: its tokens as the server counts them, special ones included; None where unknown.
        output_len: tokens to generate.
    """

    prompt: str | list[int]
    prompt_len: int | None
    output_len: int


class DatasetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset flags, see `tercet bench serve --help`."""

    name: str = "random"
    path: Path | None = None
    num_prompts: int = 1000
    seed: int = 0
    disable_shuffle: bool = False
    no_oversample: bool = False
    skip_chat_template: bool = False
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    random_vocab_size: int | None = None
    sharegpt_output_len: int | None = None
    custom_output_len: int = 256
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128

    def __post_init__(self) -> None:
        if self.name in _FROM_FILE and self.path is None:
            raise ConfigError("dataset_path", f"is needed for --dataset-name {self.name}")
        if self.name not in _FROM_FILE and self.path is not None:
            raise ConfigError(
                "dataset_path", f"does not go with --dataset-name {self.name}: sharegpt, custom do"
            )
        if not 0 <= self.random_range_ratio < 1:
            raise ConfigError("random_range_ratio", f"must be in [0, 1); got {self.random_range_ratio}")
        least = {
            "num_prompts": 1,
            "random_input_len": 1,
            "random_output_len": 1,
            "random_prefix_len": 0,
            "prefix_repetition_prefix_len": 1,
            "prefix_repetition_suffix_len": 1,
            "prefix_repetition_num_prefixes": 1,
            "prefix_repetition_output_len": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ConfigError(name, f"must be at least {minimum}; got {getattr(self, name)}")
        if self.random_vocab_size is not None and (self.name in _FROM_FILE or self.random_vocab_size < 2):
            raise ConfigError("random_vocab_size", "must be at least 2, and is for synthetic datasets")

    @property
    def nominal_len(self) -> int:
        """Tokens of a synthetic prompt and its answer, before lengths are varied; 0 for files."""
        if self.name == "random":
            return self.random_prefix_len + self.random_input_len + self.random_output_len
        if self.name == "prefix_repetition":
            prompt_len = self.prefix_repetition_prefix_len + self.prefix_repetition_suffix_len
            return prompt_len + self.prefix_repetition_output_len
        return 0


def make_prompts(
    config: DatasetConfig, tokenizer: Tokenizer | None, *, for_chat: bool = False
) -> list[BenchPrompt]:
    """The prompts of a run, equal for equal configs.

    Args:
        tokenizer: None where there is none; `random_vocab_size` and custom files can do without.
        for_chat: they go to a chat endpoint, whose server applies the chat template.

    Raises:
        ConfigError: the file is not as it should be, or the dataset needs a tokenizer.
    """
    rng = np.random.default_rng(config.seed)
    make: dict[str, Callable[[], list[BenchPrompt]]] = {
        "random": lambda: _random(config, _writer(config, tokenizer, rng), rng),
        "prefix_repetition": lambda: _prefix_repetition(config, _writer(config, tokenizer, rng), rng),
        "sharegpt": lambda: _sharegpt(config, _needed(tokenizer, config), rng),
        "custom": lambda: _custom(config, tokenizer, rng, for_chat),
    }
    if config.name not in make:
        raise ConfigError("dataset_name", f"{config.name!r} is none of {', '.join(NAMES)}")
    return make[config.name]()


# ---- synthetic prompts


class _TokenWriter:
    """Prompts as token ids."""

    num_special = 0

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def draw(self, rng: np.random.Generator, length: int) -> list[int]:
        return [int(token) for token in rng.integers(0, self._vocab_size, length)]

    def write(self, prompts: list[list[int]], rng: np.random.Generator) -> list[tuple[str | list[int], int]]:
        """Each prompt with its length."""
        return [(token_ids, len(token_ids)) for token_ids in prompts]


class _TextWriter:
    """Prompts as text that the tokenizer turns into as many tokens as asked for.

    Random tokens need not survive a round trip through text, for neighbours may join. So the text is encoded
    again, and cut or lengthened, until its length holds.
    """

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self._tokenizer = tokenizer
        self._allowed = np.array(_stable_tokens(tokenizer, rng))
        self.num_special = len(tokenizer.encode("a")) - len(tokenizer.encode("a", add_special_tokens=False))

    def draw(self, rng: np.random.Generator, length: int) -> list[int]:
        return [int(token) for token in rng.choice(self._allowed, length)]

    def write(self, prompts: list[list[int]], rng: np.random.Generator) -> list[tuple[str | list[int], int]]:
        """Each prompt with its length, as the server counts it."""
        lengths = [len(token_ids) for token_ids in prompts]
        texts = [self._tokenizer.decode(token_ids) for token_ids in prompts]
        pending = list(range(len(texts)))
        for _ in range(_FIT_ROUNDS):
            encoded = self._tokenizer.encode_batch([texts[one] for one in pending], add_special_tokens=False)
            misfits = [
                pair for pair in zip(pending, encoded, strict=True) if len(pair[1]) != lengths[pair[0]]
            ]
            for one, token_ids in misfits:
                kept = token_ids[: lengths[one]]
                texts[one] = self._tokenizer.decode(kept + self.draw(rng, lengths[one] - len(kept)))
            pending = [one for one, _ in misfits]
            if not pending:
                break
        for one in pending:  # rare: its true length then
            lengths[one] = len(self._tokenizer.encode(texts[one], add_special_tokens=False))
        return [(text, length + self.num_special) for text, length in zip(texts, lengths, strict=True)]


def _stable_tokens(tokenizer: Tokenizer, rng: np.random.Generator) -> list[int]:
    """Tokens that come back from text, of a random sample; pieces of characters do not, nor special tokens."""
    size = tokenizer.vocab_size
    sample = [int(token) for token in rng.permutation(size)[:_CANDIDATES]]
    texts = [tokenizer.decode([token], skip_special_tokens=True) for token in sample]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    stable = [token for token, again in zip(sample, encoded, strict=True) if again == [token]]
    return stable or sample


def _writer(
    config: DatasetConfig, tokenizer: Tokenizer | None, rng: np.random.Generator
) -> _TokenWriter | _TextWriter:
    if config.random_vocab_size is not None:
        return _TokenWriter(config.random_vocab_size)
    return _TextWriter(_needed(tokenizer, config), rng)


def _needed(tokenizer: Tokenizer | None, config: DatasetConfig) -> Tokenizer:
    if tokenizer is None:
        alternative = "" if config.name in _FROM_FILE else ", or --random-vocab-size N to send token ids"
        raise ConfigError(
            "tokenizer", f"--dataset-name {config.name} needs one: --tokenizer PATH{alternative}"
        )
    return tokenizer


def _random(
    config: DatasetConfig, writer: _TokenWriter | _TextWriter, rng: np.random.Generator
) -> list[BenchPrompt]:
    """One prefix that all share, then random tokens; lengths uniform within the ratio around the given ones."""
    count, ratio = config.num_prompts, config.random_range_ratio
    input_lens = _lengths(rng, max(config.random_input_len - writer.num_special, 1), ratio, count)
    output_lens = _lengths(rng, config.random_output_len, ratio, count)
    prefix = writer.draw(rng, config.random_prefix_len)
    written = writer.write([prefix + writer.draw(rng, input_len) for input_len in input_lens], rng)
    return [BenchPrompt(*pair, output_len) for pair, output_len in zip(written, output_lens, strict=True)]


def _lengths(rng: np.random.Generator, length: int, ratio: float, count: int) -> list[int]:
    low, high = max(math.floor(length * (1 - ratio)), 1), math.ceil(length * (1 + ratio))
    return [int(one) for one in rng.integers(low, high + 1, count)]


def _prefix_repetition(
    config: DatasetConfig, writer: _TokenWriter | _TextWriter, rng: np.random.Generator
) -> list[BenchPrompt]:
    """Prompts that share one of a few prefixes, in random order."""
    prefixes = [
        writer.draw(rng, config.prefix_repetition_prefix_len)
        for _ in range(config.prefix_repetition_num_prefixes)
    ]
    whole = [
        prefixes[index % len(prefixes)] + writer.draw(rng, config.prefix_repetition_suffix_len)
        for index in range(config.num_prompts)
    ]
    output_len = config.prefix_repetition_output_len
    prompts = [BenchPrompt(*pair, output_len) for pair in writer.write(whole, rng)]
    if not config.disable_shuffle:
        rng.shuffle(prompts)
    return prompts


# ---- prompts of a file


class _Turn(msgspec.Struct):
    value: str


class _Conversation(msgspec.Struct):
    conversations: list[_Turn] = []


class _CustomLine(msgspec.Struct):
    prompt: str
    output_tokens: int | None = None


def _read(config: DatasetConfig) -> bytes:
    assert config.path is not None
    try:
        return config.path.read_bytes()
    except OSError as error:
        raise ConfigError("dataset_path", f"cannot read {config.path}: {error.strerror}") from None


def _sharegpt(config: DatasetConfig, tokenizer: Tokenizer, rng: np.random.Generator) -> list[BenchPrompt]:
    """The first question of each conversation, with the answer's length; ones of unusual length are left out."""
    try:
        conversations = msgspec.json.decode(_read(config), type=list[_Conversation])
    except msgspec.MsgspecError as error:
        raise ConfigError("dataset_path", f"{config.path} is not in ShareGPT's form: {error}") from None
    rows = [row.conversations for row in conversations if len(row.conversations) >= 2]
    if not config.disable_shuffle:
        rng.shuffle(rows)
    prompts: list[BenchPrompt] = []
    for question, answer, *_ in rows:
        if len(prompts) == config.num_prompts:
            break
        prompt_len = len(tokenizer.encode(question.value))
        given = config.sharegpt_output_len
        output_len = len(tokenizer.encode(answer.value)) if given is None else given
        if _is_usual(prompt_len, output_len, output_is_given=given is not None):
            prompts.append(BenchPrompt(question.value, prompt_len, output_len))
    return _oversample(prompts, config, rng)


def _is_usual(prompt_len: int, output_len: int, *, output_is_given: bool) -> bool:
    return (
        prompt_len >= _SHAREGPT_MIN
        and (output_is_given or output_len >= _SHAREGPT_MIN)
        and prompt_len <= _SHAREGPT_MAX_PROMPT
        and prompt_len + output_len <= _SHAREGPT_MAX_TOTAL
    )


def _custom(
    config: DatasetConfig, tokenizer: Tokenizer | None, rng: np.random.Generator, for_chat: bool
) -> list[BenchPrompt]:
    """One {"prompt": …} in each line, with "output_tokens" where --custom-output-len is -1."""
    rows = [
        _custom_line(config, *numbered)
        for numbered in enumerate(_read(config).splitlines(), 1)
        if numbered[1].strip()
    ]
    if not config.disable_shuffle:
        rng.shuffle(rows)
    with_template = tokenizer is not None and bool(tokenizer.chat_template)
    render = with_template and not config.skip_chat_template and not for_chat
    prompts = []
    for row in rows[: config.num_prompts]:
        prompt = row.prompt
        if render:
            assert tokenizer is not None
            messages = [{"role": "user", "content": prompt}]
            prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        prompt_len = None if tokenizer is None else len(tokenizer.encode(prompt))
        output_len = row.output_tokens if config.custom_output_len == -1 else config.custom_output_len
        assert output_len is not None
        prompts.append(BenchPrompt(prompt, prompt_len, output_len))
    return _oversample(prompts, config, rng)


def _custom_line(config: DatasetConfig, number: int, line: bytes) -> _CustomLine:
    try:
        row = msgspec.json.decode(line, type=_CustomLine)
    except msgspec.MsgspecError as error:
        raise ConfigError("dataset_path", f"{config.path}, line {number}: {error}") from None
    if config.custom_output_len == -1 and row.output_tokens is None:
        raise ConfigError(
            "custom_output_len", f"is -1, but line {number} of {config.path} has no output_tokens"
        )
    return row


def _oversample(
    prompts: list[BenchPrompt], config: DatasetConfig, rng: np.random.Generator
) -> list[BenchPrompt]:
    """Fill up to num_prompts with repetitions, unless that is unwanted."""
    if not prompts:
        raise ConfigError("dataset_path", f"{config.path} has no prompt that can be used")
    if config.no_oversample:
        return prompts
    extra = rng.integers(0, len(prompts), max(config.num_prompts - len(prompts), 0))
    return prompts + [prompts[int(index)] for index in extra]
