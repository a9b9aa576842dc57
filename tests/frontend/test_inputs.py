"""Prompts are told apart by form, and what is not supported is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tercet import ValidationError
from tercet.frontend.inputs import as_prompts, parse_prompt


def test_forms_of_prompts() -> None:
    assert parse_prompt("hi") == ("hi", None, "")
    assert parse_prompt([1, 2]) == (None, [1, 2], "")
    assert parse_prompt({"prompt": "hi", "cache_salt": "s"}) == ("hi", None, "s")
    assert parse_prompt({"prompt_token_ids": [1], "prompt": "x"}) == ("x", [1], "")
    assert parse_prompt({"prompt": "hi", "multi_modal_data": None}) == ("hi", None, "")  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (None, "prompt"),
        (5, "prompt"),
        (b"bytes", "prompt"),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ("\udc80", "prompt"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids"),
        ({"prompt_token_ids": 5}, "prompt_token_ids"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "cache_salt": 5}, "cache_salt"),
        ({"prompt": "x", "cache_salt": "s" * 1025}, "cache_salt"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
        ({"prompt_embeds": np.zeros(3)}, "prompt_embeds"),
        ({"encoder_prompt": "x", "decoder_prompt": "y"}, "encoder_prompt"),
        ({"prompt": "x", "promt": "y"}, "prompt"),
        ({5: "x"}, "prompt"),
    ],
)
def test_other_forms_are_refused_by_name(prompt: Any, field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse_prompt(prompt)
    assert caught.value.field == field


def test_one_prompt_or_several() -> None:
    assert as_prompts("hi") == ["hi"]
    assert as_prompts([1, 2]) == [[1, 2]]
    assert as_prompts({"prompt": "x"}) == [{"prompt": "x"}]
    assert as_prompts(["a", [1]]) == ["a", [1]]
    assert as_prompts(("a", "b")) == ["a", "b"]
    assert as_prompts([]) == []
    assert len(as_prompts(np.arange(3))) == 1  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="prompts"):
        as_prompts(5)  # type: ignore[arg-type]
