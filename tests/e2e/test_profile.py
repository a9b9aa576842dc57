"""`start_profile` and `stop_profile` through real processes: a worker with a small model on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import trace
from tercet import LLM, AsyncLLM, EngineError, SamplingParams, ValidationError
from tercet.ipc.messages import StartProfile
from tests.worker_proc.runner_harness import TINY_LLAMA

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
PROMPTS: list[Any] = [[1, 2, 3], [4, 5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where traces go: made by the worker."""
    return tmp_path_factory.mktemp("profiles") / "new"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[LLM]:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text(json.dumps(TINY_LLAMA))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERCET_TORCH_PROFILER_DIR", str(folder))
        engine = LLM(
            str(model),
            load_format="dummy",
            device="cpu",
            skip_tokenizer_init=True,
            max_num_seqs=4,
            kv_cache_memory_bytes=8 << 20,
            num_threads=1,
        )
    with engine:
        yield engine


def test_a_trace_has_the_steps_between_start_and_stop(llm: LLM, folder: Path) -> None:
    before = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.start_profile("mine")
    during = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.stop_profile()
    after = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in before] == [o.outputs[0].token_ids for o in during]
    assert [o.outputs[0].token_ids for o in before] == [o.outputs[0].token_ids for o in after]
    (path,) = folder.glob("mine_*.json.gz")
    steps = trace.read(path).steps
    assert steps[0].kind == "prefill"
    decodes = [step for step in steps if step.kind == "decode"]
    assert 10 <= len(decodes) <= 14 and all(step.host_us > 0 for step in decodes)
    numbers = [step.number for step in steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(steps)))


def test_each_trace_has_its_own_file(llm: LLM, folder: Path) -> None:
    for _ in range(2):
        llm.start_profile()
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        llm.stop_profile()
    assert len(list(folder.glob("profile_*.json.gz"))) == 2


def test_starts_and_stops_out_of_order_are_refused(llm: LLM) -> None:
    with pytest.raises(EngineError, match="no profile is being made: start one first"):
        llm.stop_profile()
    llm.start_profile("twice")
    with pytest.raises(EngineError, match="a profile is being made: stop it first"):
        llm.start_profile()
    llm.stop_profile()
    assert llm.generate(PROMPTS[0], PARAMS, use_tqdm=False)[0].finished


@pytest.mark.parametrize("prefix", ["../up", "a/b", "a b", "x" * 65, 5])
def test_prefixes_that_are_no_part_of_a_file_name_are_refused(llm: LLM, prefix: Any) -> None:
    with pytest.raises(ValidationError, match="prefix: must match"):
        llm.start_profile(prefix)


def test_the_worker_trusts_no_prefix_either(llm: LLM, folder: Path) -> None:
    async def start(engine: AsyncLLM) -> None:
        await engine._client.call(StartProfile(prefix="../up"))

    with pytest.raises(EngineError, match="prefix: must match"):
        llm._thread.run(start(llm._engine))
    assert not list(folder.parent.glob("up*"))


def test_a_simulated_engine_says_that_it_cannot() -> None:
    with LLM(device="simulated") as engine:
        with pytest.raises(EngineError, match="a simulated worker cannot be profiled"):
            engine.start_profile()
        assert len(engine.generate([[1, 2]], PARAMS, use_tqdm=False)[0].outputs[0].token_ids) == 12
