"""LLM with real processes: a core and a simulated worker."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tercet import (
    LLM,
    ConfigError,
    EngineClosedError,
    EngineDeadError,
    SamplingParams,
    ValidationError,
)
from tercet.config import SimulationConfig
from tercet.frontend.metrics import Gauge
from tests.frontend.text_engine import make_bundle, make_tokenizer


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A simulated engine with a small tokenizer."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    for name, content in make_bundle().to_files().items():
        (folder / name).write_bytes(content)
    with LLM(
        device="simulated",
        tokenizer=str(folder),
        hf_overrides={"vocab_size": 700, "eos_token_id": 699},
        max_model_len=4096,
        simulation=SimulationConfig(verify=True),
        audit=True,
    ) as engine:
        yield engine


def running(llm: LLM) -> float:
    (gauge,) = [m for m in llm.get_metrics() if m.name == "tercet:num_requests_running"]
    assert isinstance(gauge, Gauge)
    return gauge.value


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"prompt number {i}" for i in range(40)]
    params = [SamplingParams(max_tokens=1 + i % 9, ignore_eos=True, seed=i) for i in range(40)]
    outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1 + i % 9 for i in range(40)]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    again = llm.generate(prompts[7], params[7], use_tqdm=False)
    assert again[0].outputs[0].token_ids == outputs[7].outputs[0].token_ids


def test_one_prompt_of_any_form_and_none(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2)
    for prompt in ("text", [1, 2], {"prompt": "text"}, {"prompt_token_ids": [1]}):
        assert len(llm.generate(prompt, params, use_tqdm=False)) == 1  # type: ignore[arg-type]
    assert llm.generate([], params, use_tqdm=False) == []


def test_children_equal_single_requests_with_their_seeds(llm: LLM) -> None:
    from tercet.frontend.input_processor import derive_child_seed

    params = SamplingParams(n=3, seed=11, max_tokens=20, ignore_eos=True)
    together = llm.generate("abc", params, use_tqdm=False)[0].outputs
    alone = [
        llm.generate(
            "abc",
            SamplingParams(seed=derive_child_seed(11, i), max_tokens=20, ignore_eos=True),
            use_tqdm=False,
        )[0].outputs[0]
        for i in range(3)
    ]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_chat_renders_the_models_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    (output,) = llm.chat(messages, SamplingParams(max_tokens=3), use_tqdm=False)
    assert output.prompt == "user: Hello there\nassistant:"
    assert output.prompt_token_ids == make_tokenizer().encode(output.prompt, add_special_tokens=False)
    outputs = llm.chat([messages, messages], SamplingParams(max_tokens=3), use_tqdm=False)
    assert len(outputs) == 2
    (custom,) = llm.chat(
        messages, SamplingParams(max_tokens=3), use_tqdm=False, chat_template="{{ messages[0].content }}!"
    )
    assert custom.prompt == "Hello there!"


def test_wrong_messages_are_named(llm: LLM) -> None:
    good = [{"role": "user", "content": "Hello"}]
    with pytest.raises(ValidationError, match=r"^messages\[1\]\.content: is missing"):
        llm.chat([*good, {"role": "user"}], use_tqdm=False)
    with pytest.raises(ValidationError, match=r"^messages\[1\]\[0\]\.role: must be a string"):
        llm.chat([good, [{"content": "Hello"}]], use_tqdm=False)
    with pytest.raises(ValidationError, match=r"^messages\[2\]: must be a list of messages; got 'Hello'"):
        llm.chat([good, good, "Hello"], use_tqdm=False)  # type: ignore[list-item]
    assert running(llm) == 0


def test_bad_prompt_ends_the_call_and_aborts_the_others(llm: LLM) -> None:
    prompts: list[Any] = [[1, 2]] * 40 + [[10**6]]
    with pytest.raises(ValidationError, match="prompt_token_ids"):
        llm.generate(prompts, SamplingParams(max_tokens=4000, ignore_eos=True), use_tqdm=False)
    deadline = time.monotonic() + 10
    while running(llm):
        assert time.monotonic() < deadline
    assert llm.generate("still here", SamplingParams(max_tokens=2), use_tqdm=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sampling_params": [SamplingParams()]},
        {"sampling_params": {"n": 1}},
        {"priority": [1]},
        {"priority": "high"},
        {"prompts": 5},
        {"prompts": [None, "x"]},
    ],
)
def test_wrong_arguments_are_named(llm: LLM, arguments: dict[str, Any]) -> None:
    given = {"prompts": ["a", "b"], "sampling_params": SamplingParams(), "use_tqdm": False, **arguments}
    with pytest.raises(ValidationError):
        llm.generate(**given)


def test_defaults_tokenizer_metrics_and_cache(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    assert llm.get_tokenizer().encode("abc") == make_tokenizer().encode("abc")
    assert {m.name for m in llm.get_metrics()} >= {"tercet:generation_tokens", "tercet:kv_cache_usage_perc"}
    assert llm.reset_prefix_cache() is True


def test_works_from_several_threads_at_once(llm: LLM) -> None:
    found: dict[int, list[int]] = {}

    def use(i: int) -> None:
        params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
        found[i] = llm.generate([i + 1], params, use_tqdm=False)[0].outputs[0].token_ids

    threads = [threading.Thread(target=use, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(6))
    assert len({tuple(ids) for ids in found.values()}) == 6


def test_progress_bar_shows_speed(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    llm.generate(["a", "b"], SamplingParams(max_tokens=3))
    error = capsys.readouterr().err
    assert "2/2" in error
    assert "est. speed input" in error
    assert set(threading.enumerate()) == before


def test_interrupt_aborts_and_leaves_the_engine_usable(llm: LLM) -> None:
    def interrupt() -> None:
        while not running(llm):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2]] * 20, SamplingParams(max_tokens=4000, ignore_eos=True), use_tqdm=False)
    thread.join()
    deadline = time.monotonic() + 10
    while running(llm):
        assert time.monotonic() < deadline
    assert llm.generate("still here", SamplingParams(max_tokens=2), use_tqdm=False)


# ---- engines of their own


def test_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        LLM(device="simulated", max_modle_len=5)


def test_many_more_requests_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from tercet.frontend import batches as module

    monkeypatch.setattr(module, "MAX_UNFINISHED", 20)
    with LLM(device="simulated", max_num_queued_reqs=64) as llm:
        params = SamplingParams(max_tokens=3, n=2, ignore_eos=True)
        outputs = llm.generate([[i + 1] for i in range(300)], params, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [[i + 1] for i in range(300)]


def test_two_in_one_process_off_the_main_thread_leave_nothing() -> None:
    def use() -> None:
        with LLM(device="simulated") as first, LLM(device="simulated") as second:
            for llm in (first, second):
                assert llm.generate([1], SamplingParams(max_tokens=2), use_tqdm=False)

    def use_in_thread() -> None:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    children = set(psutil.Process().children(recursive=True))
    use_in_thread()
    gc.collect()
    threads, fds = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    use_in_thread()
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == fds
    assert set(psutil.Process().children(recursive=True)) == children


def test_a_dropped_one_ends_its_processes() -> None:
    llm = LLM(device="simulated")
    assert llm._engine._processes is not None
    pids = list(llm._engine._processes.pids.values())
    del llm
    gc.collect()
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_death_is_noticed_and_close_still_works() -> None:
    llm = LLM(device="simulated")
    assert llm._engine._processes is not None
    os.kill(llm._engine._processes.pids["core"], signal.SIGKILL)
    with pytest.raises(EngineDeadError):
        llm.generate([[1]] * 4, SamplingParams(max_tokens=4000, ignore_eos=True), use_tqdm=False)
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate([1], SamplingParams(), use_tqdm=False)


def test_program_that_never_closes_exits_cleanly() -> None:
    code = (
        "from tercet import LLM, SamplingParams\n"
        "llm = LLM(device='simulated')\n"
        "print(llm.generate([1], SamplingParams(max_tokens=2), use_tqdm=False)[0].finished)\n"
        "print(*llm._engine._processes.pids.values())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True"
    assert not [pid for pid in map(int, second.split()) if psutil.pid_exists(pid)]
