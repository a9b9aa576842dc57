"""Tercet: an LLM inference and serving engine of three kinds of process that talk only by messages.

Names are imported on first use (PEP 562), so `import tercet` takes milliseconds and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tercet.version import __version__

if TYPE_CHECKING:
    from tercet.config import AsyncEngineArgs, EngineArgs
    from tercet.errors import (
        ConfigError,
        EngineClosedError,
        EngineDeadError,
        EngineError,
        ModelNotFoundError,
        QueueFullError,
        RequestError,
        StartupError,
        TercetError,
        UnsupportedModelError,
        ValidationError,
    )
    from tercet.frontend.async_llm import AsyncLLM
    from tercet.frontend.async_llm import AsyncLLM as AsyncLLMEngine
    from tercet.frontend.flat_logprobs import FlatLogprobs, Logprob
    from tercet.frontend.inputs import PromptType, TextPrompt, TokensPrompt
    from tercet.frontend.llm import LLM
    from tercet.frontend.outputs import CompletionOutput, RequestOutput
    from tercet.frontend.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchParams",
    "CompletionOutput",
    "ConfigError",
    "EngineArgs",
    "EngineClosedError",
    "EngineDeadError",
    "EngineError",
    "FlatLogprobs",
    "Logprob",
    "ModelNotFoundError",
    "PromptType",
    "QueueFullError",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StartupError",
    "TercetError",
    "TextPrompt",
    "TokensPrompt",
    "UnsupportedModelError",
    "ValidationError",
    "__version__",
]

_MODULES = {
    "tercet.config": ("AsyncEngineArgs", "EngineArgs"),
    "tercet.errors": (
        "ConfigError",
        "EngineClosedError",
        "EngineDeadError",
        "EngineError",
        "ModelNotFoundError",
        "QueueFullError",
        "RequestError",
        "StartupError",
        "TercetError",
        "UnsupportedModelError",
        "ValidationError",
    ),
    "tercet.frontend.async_llm": ("AsyncLLM",),
    "tercet.frontend.inputs": ("PromptType", "TextPrompt", "TokensPrompt"),
    "tercet.frontend.llm": ("LLM",),
    "tercet.frontend.flat_logprobs": ("FlatLogprobs", "Logprob"),
    "tercet.frontend.outputs": ("CompletionOutput", "RequestOutput"),
    "tercet.frontend.sampling_params": ("BeamSearchParams", "RequestOutputKind", "SamplingParams"),
}
# Public name -> (module, name there).
_EXPORTS = {name: (module, name) for module, names in _MODULES.items() for name in names}
_EXPORTS["AsyncLLMEngine"] = ("tercet.frontend.async_llm", "AsyncLLM")  # vLLM's second name for it


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value  # from now on a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
