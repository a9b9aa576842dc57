"""The model runner under a real scheduler: the same tokens however steps are cut, and a step of constant cost."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tercet.ipc.messages import AddRequest, Finish, Sampling
from tests.worker_proc.runner_harness import VOCAB_SIZE, RunnerEngine


def make_request(
    handle: int, prompt: list[int], *, outputs: list[int] | None = None, **sampling: Any
) -> AddRequest:
    return AddRequest(
        epoch=1,
        handle=handle,
        token_ids=np.array(prompt + (outputs or []), np.int32),
        prompt_len=len(prompt),
        sampling=Sampling(**{"max_tokens": 20, "temperature": 0.0, **sampling}),
        seeds=[1000 + handle],
    )


FEATURES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias_ids": np.array([5, 6], np.int32), "logit_bias_values": np.array([3, -50], np.float32)},
    {"temperature": 1.0, "allowed_token_ids": np.arange(50, 90, dtype=np.int32)},
    {"temperature": 1.0, "bad_words": [[7], [8, 9]], "min_tokens": 5, "eos_token_ids": list(range(200))},
    {"temperature": 1.5, "stop_token_ids": list(range(100, 300))},
]


def mixed_requests(count: int = 24) -> list[AddRequest]:
    """Every sampler feature somewhere in the batch; prompts of 1 to 60 tokens."""
    rng = random.Random(0)
    requests = []
    for handle in range(count):
        prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(rng.randint(1, 60))]
        features = FEATURES[handle % len(FEATURES)]
        requests.append(make_request(handle, prompt, max_tokens=rng.randint(6, 40), **features))
    return requests


def run(folder: Path, depth: int, **args: Any) -> tuple[dict[int, list[int]], dict[int, int], RunnerEngine]:
    engine = RunnerEngine(folder, **args)
    for message in mixed_requests():
        engine.add(message)
    engine.run(depth)
    return engine.tokens, engine.finish, engine


@pytest.mark.parametrize(
    ("depth", "args"),
    [
        pytest.param(1, {}, id="plain loop"),
        pytest.param(2, {}, id="two steps in flight"),
        pytest.param(3, {}, id="three steps in flight"),
        pytest.param(2, {"max_num_seqs": 5}, id="few rows"),
        pytest.param(2, {"max_num_seqs": 16, "max_num_batched_tokens": 17}, id="tiny budget"),
        pytest.param(2, {"num_blocks": 18}, id="forced preemption"),
        pytest.param(2, {"enable_prefix_caching": False}, id="no prefix cache"),
        pytest.param(2, {"block_size": 5}, id="odd block size"),
        pytest.param(2, {"use_device_steps": True}, id="a GPU's steps"),
        pytest.param(
            3, {"use_device_steps": True, "num_blocks": 24, "block_size": 5}, id="a GPU's steps, preemption"
        ),
        pytest.param(
            2,
            {"use_device_steps": True, "max_num_seqs": 16, "max_num_batched_tokens": 17},
            id="a GPU's steps, tiny budget",
        ),
    ],
)
def test_tokens_do_not_depend_on_how_steps_are_cut(tmp_path: Path, depth: int, args: dict[str, Any]) -> None:
    alone = {}
    for message in mixed_requests():
        engine = RunnerEngine(tmp_path)
        engine.add(message)
        alone |= engine.run(1)
    tokens, _, engine = run(tmp_path, depth, **args)
    assert tokens == alone
    if "num_blocks" in args:
        assert engine.scheduler.counters.num_preemptions > 0


@pytest.fixture(params=[False, True], ids=["a CPU's steps", "a GPU's steps"])
def device_steps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_finish_reasons(tmp_path: Path, device_steps: bool) -> None:
    engine = RunnerEngine(tmp_path, use_device_steps=device_steps)
    engine.add(make_request(0, [1, 2, 3], max_tokens=5))
    free = engine.run()[0]
    engine.add(make_request(1, [1, 2, 3], eos_token_ids=[free[1]]))
    engine.add(make_request(2, [1, 2, 3], stop_token_ids=[free[1]]))
    engine.add(make_request(3, [1] * 250, max_tokens=100))
    engine.run()
    assert engine.finish == {0: Finish.LENGTH, 1: Finish.EOS, 2: Finish.STOP_TOKEN, 3: Finish.LENGTH}
    until = free.index(free[1]) + 1
    assert engine.tokens[1] == engine.tokens[2] == free[:until]
    assert len(engine.tokens[3]) == 6  # max_model_len is 256


def test_resumed_request_goes_on_where_it_stopped(tmp_path: Path, device_steps: bool) -> None:
    settings = {"temperature": 1.0, "frequency_penalty": 0.7, "max_tokens": 30}
    whole = RunnerEngine(tmp_path)
    whole.add(make_request(4, [9, 8, 7], **settings))
    tokens = whole.run()[4]
    resumed = RunnerEngine(tmp_path, use_device_steps=device_steps)
    resumed.add(make_request(4, [9, 8, 7], outputs=tokens[:11], **settings))
    assert resumed.run()[4] == tokens


def test_row_with_every_token_masked_fails_alone(tmp_path: Path, device_steps: bool) -> None:
    engine = RunnerEngine(tmp_path, use_device_steps=device_steps)
    engine.add(make_request(0, [1, 2, 3]))
    everything = np.arange(VOCAB_SIZE, dtype=np.int32)
    bias = np.full(VOCAB_SIZE, -np.inf, np.float32)
    engine.add(make_request(1, [4, 5], logit_bias_ids=everything, logit_bias_values=bias))
    engine.run()
    assert engine.failed.keys() == {1}
    assert engine.finish[0] == Finish.LENGTH
    engine.scheduler.check_invariants()


def test_logprobs_of_a_gpus_steps_are_those_of_a_cpus(tmp_path: Path) -> None:
    found = []
    for use_device_steps in (False, True):
        engine = RunnerEngine(tmp_path, use_device_steps=use_device_steps)
        engine.add(make_request(0, [1, 2, 3], logprobs=4, temperature=1.0))
        engine.add(make_request(1, [5, 6]))
        prompt = make_request(2, list(range(1, 40)), prompt_logprobs=2, logprobs=0, repetition_penalty=1.4)
        engine.add(prompt)
        engine.run()
        columns = [message.logprobs for message in engine.outputs if message.logprobs is not None]
        prompts = [
            message.prompt_logprobs for message in engine.outputs if message.prompt_logprobs is not None
        ]
        found.append((columns, prompts))
    (columns, prompts), (gpu_columns, gpu_prompts) = found
    assert len(columns) == len(gpu_columns) > 10 and len(prompts) == len(gpu_prompts) == 1
    for mine, gpu in zip([*columns, *prompts], [*gpu_columns, *gpu_prompts], strict=True):
        np.testing.assert_array_equal(mine.token_ids, gpu.token_ids)
        np.testing.assert_array_equal(mine.rank, gpu.rank)
        np.testing.assert_allclose(mine.logprobs, gpu.logprobs, rtol=1e-5, atol=1e-5)


def test_kv_cache_in_fp8_is_small_and_changes_little(tmp_path: Path, device_steps: bool) -> None:
    prompts = [[1 + i, 2, 3 * i + 4, *range(5, 30)] for i in range(8)]
    found, block_bytes = {}, {}
    for kv_cache_dtype in ("auto", "fp8"):
        engine = RunnerEngine(tmp_path, kv_cache_dtype=kv_cache_dtype, use_device_steps=device_steps)
        for handle, prompt in enumerate(prompts):
            engine.add(make_request(handle, prompt, prompt_logprobs=0, max_tokens=2))
        engine.run()
        parts = [m.prompt_logprobs.logprobs.ravel() for m in engine.outputs if m.prompt_logprobs is not None]
        found[kv_cache_dtype] = np.concatenate(parts)
        block_bytes[kv_cache_dtype] = engine.runner.groups[0].block_bytes
    assert block_bytes["auto"] == 4 * block_bytes["fp8"]  # float32 here
    errors = np.abs(found["fp8"] - found["auto"])
    assert 0 < errors.max() < 0.2 and errors.mean() < 0.02


def count_calls(engine: RunnerEngine, steps: int) -> list[int]:
    """Python calls (functions and builtins) in `execute` of steps that carry no change."""
    counts = []
    while len(counts) < steps:
        plan = engine.scheduler.schedule(0.0)
        assert plan is not None
        calls = 0

        def profile(_frame: object, event: str, _arg: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(profile)
        try:
            engine.runner.execute(plan, 0.0, engine.in_flight.append)
        finally:
            sys.setprofile(None)
        engine.land()
        if plan.blocks is None and plan.states is None and plan.chunks is None:
            counts.append(calls)
    return counts


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "frequency_penalty": 1.0}]
)
def test_calls_of_a_steady_step_do_not_grow_with_the_batch(tmp_path: Path, sampling: dict[str, Any]) -> None:
    found = {}
    for batch in (8, 256):
        engine = RunnerEngine(tmp_path, num_blocks=1024, audit=False)
        for handle in range(batch):
            engine.add(make_request(handle, [1 + handle, 2, 3], max_tokens=40, **sampling))
        for _ in range(3):
            engine.launch()
            engine.land()
        found[batch] = set(count_calls(engine, 8))
    assert found[8] == found[256]
    assert len(found[8]) == 1


def test_serving_loads_no_modeling_code_of_transformers(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from tests.worker_proc.runner_harness import RunnerEngine
from tests.worker_proc.test_model_runner import make_request
import tercet.worker_proc.start, tercet.worker_proc.main
engine = RunnerEngine(Path({str(tmp_path)!r}))
engine.add(make_request(0, [1, 2, 3]))
assert len(engine.run()[0]) == 20
print([m for m in sys.modules if m.startswith("transformers")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
