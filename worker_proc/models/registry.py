"""Which class runs which architecture name of a config.json."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from tercet.errors import UnsupportedModelError
from tercet.worker_proc.models.decoder import CausalLM

# architecture -> module of this package; the class has the architecture's name
_ARCHITECTURES = {
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def supported_architectures() -> tuple[str, ...]:
    """Architecture names that can be run, sorted."""
    return tuple(sorted(_ARCHITECTURES))


def model_class(config: Mapping[str, object]) -> type[CausalLM]:
    """The class for a config.json.

    Raises:
        UnsupportedModelError: no name in `architectures` is known; the message lists those that are.
    """
    names = config.get("architectures")
    if not isinstance(names, list):
        names = []
    for name in names:
        if name in _ARCHITECTURES:
            module = importlib.import_module(f"tercet.worker_proc.models.{_ARCHITECTURES[name]}")
            found: type[CausalLM] = getattr(module, name)
            return found
    supported = ", ".join(supported_architectures())
    raise UnsupportedModelError(
        f"config.json: architectures {names!r} is not supported; supported: {supported}"
    )
