"""The command line on the real default model."""

from __future__ import annotations

import pytest

from tercet.errors import ModelNotFoundError
from tercet.model_source import resolve_model
from tests.tercet.cli_tools import run


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(resolve_model(None).path)
    except ModelNotFoundError:
        pytest.skip("the default model is not installed; `make install` brings it")


@pytest.mark.timeout(400)
def test_chat_answers_truly(model: str) -> None:
    limits = ["--max-model-len", "512", "--kv-cache-memory-bytes", "64M", "--max-num-seqs", "4"]
    question = "What is the capital of France?"
    done = run("chat", "--model", model, "--prompt", question, "--max-tokens", "24", *limits)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "TTFT" in done.stderr
