"""What vLLM's programs ask an engine of its model: `engine.model_config`, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from tercet.config import EngineConfig
from tercet.ipc.messages import Limits, ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model of an engine.

    Attributes:
        model: as it was named at the start: a path, a hub id, or the default model's name.
        served_model_name: the first of the names that it goes by.
        max_model_len: longest prompt and output together, in tokens.
        dtype: of weights and activations, as a word: 'float32', 'bfloat16', 'float16' or 'auto'.
        architectures: as the model's config names it; a list of one.
        max_logprobs: most log-probabilities that a request may ask for at each token.
    """

    model: str
    served_model_name: str
    max_model_len: int
    dtype: str
    architectures: list[str]
    max_logprobs: int
    _vocab_size: int

    @classmethod
    def of_attached(cls, model: ModelInfo, limits: Limits) -> ModelConfig:
        """From what the core said of itself."""
        return cls(
            model=model.name,
            served_model_name=model.served_names[0],
            max_model_len=model.max_model_len,
            dtype=model.dtype,
            architectures=[model.architecture],
            max_logprobs=limits.max_logprobs,
            _vocab_size=model.vocab_size,
        )

    @classmethod
    def of_engine(cls, config: EngineConfig) -> ModelConfig:
        """The same from what the engine was started with, before anything has attached to it."""
        model = config.model
        return cls(
            model=model.model,
            served_model_name=model.served_model_name[0],
            max_model_len=model.max_model_len,
            dtype=model.dtype,
            architectures=[model.architecture],
            max_logprobs=config.scheduler.max_logprobs,
            _vocab_size=model.vocab_size,
        )

    def get_vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size
