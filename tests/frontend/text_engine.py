"""What tests of requests share: a small tokenizer, and requests opened without a core."""

from __future__ import annotations

import functools
from typing import Any

from tercet import SamplingParams
from tercet.frontend.input_processor import InputProcessor
from tercet.frontend.inputs import PromptType, parse_prompt
from tercet.frontend.output_processor import OutputProcessor, RequestState
from tercet.frontend.tokenizer import Tokenizer
from tercet.frontend.tokenizer_bundle import TokenizerBundle
from tercet.ipc.messages import Finish
from tests.frontend.fake_core import make_limits, make_model
from tests.frontend.tokenizer_zoo import byte_level


@functools.cache
def make_bundle() -> TokenizerBundle:
    """Byte-level BPE of some 600 tokens, with a chat template."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return TokenizerBundle(
        tokenizer_json=byte_level().to_str().encode(),
        special_tokens={"eos_token": "<|end|>"},
        chat_templates={"default": template},
    )


@functools.cache
def make_tokenizer() -> Tokenizer:
    return Tokenizer(make_bundle())


def ids_of(text: str) -> list[int]:
    return make_tokenizer().encode(text, add_special_tokens=False)


def make_inputs(tokenizer: Tokenizer | None = None, **model: Any) -> InputProcessor:
    return InputProcessor(make_model(**model), make_limits(), tokenizer)


class Requests:
    """An output processor and what it aborts."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.inputs = make_inputs(tokenizer)
        self.aborts: list[tuple[list[int], Finish]] = []
        self.outputs = OutputProcessor(lambda handles, reason: self.aborts.append((handles, reason)))

    def add(
        self, prompt: PromptType = (5, 6, 7), request_id: str = "r", **params: Any
    ) -> tuple[RequestState, int]:  # type: ignore[assignment]
        """A request, admitted; with the handle of its first child."""
        checked = SamplingParams(**params)
        prepared = self.inputs.prepare(parse_prompt(prompt), checked, arrival_s=0.0)
        request = self.outputs.open(request_id, checked, 0.0)
        return request, self.outputs.admit(request, prepared)
