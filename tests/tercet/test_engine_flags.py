"""Engine arguments as flags of someone else's program, as programs written for vLLM add them."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from tercet import AsyncEngineArgs, EngineArgs
from tercet.config import SimulationConfig
from tercet.engine_flags import GROUPS
from tercet.frontend.llm import _engine_args
from tercet.utils import FlexibleArgumentParser
from tercet.utils.argparse_utils import FlexibleArgumentParser as SameParser

KINDS = (EngineArgs, AsyncEngineArgs)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_flag_and_its_default(kind: type[EngineArgs]) -> None:
    parser = FlexibleArgumentParser()
    assert kind.add_cli_args(parser) is parser
    args = parser.parse_args([])
    assert set(vars(args)) == {field.name for field in dataclasses.fields(kind)}
    assert kind.from_cli_args(args) == kind()
    assert "--max-model-len" in parser.format_help()


def test_every_described_field_exists() -> None:
    described = [name for group in GROUPS.values() for name in group]
    assert sorted(described) == sorted(field.name for field in dataclasses.fields(AsyncEngineArgs))


def test_arguments_of_the_program_itself_are_left_alone() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.set_defaults(model="some/model")
    parser.add_argument_group("sampling").add_argument("--max-tokens", type=int)
    args = parser.parse_args(["--max_tokens", "5", "--seed", "3", "--enforce-eager", "--max_model_len=8k"])
    expected = EngineArgs(model="some/model", seed=3, enforce_eager=True, max_model_len=8000)
    assert EngineArgs.from_cli_args(args) == expected
    rest = vars(args)
    assert rest.pop("max_tokens") == 5
    assert _engine_args(rest.pop("model"), rest) == expected  # what LLM(**args) does


def test_flags_may_go_into_a_group_of_the_programs(recwarn: pytest.WarningsRecorder) -> None:
    parser = FlexibleArgumentParser()
    group = parser.add_argument_group("Engine arguments")
    assert EngineArgs.add_cli_args(group) is group
    group.set_defaults(model="some/model")
    assert EngineArgs.from_cli_args(parser.parse_args([])) == EngineArgs(model="some/model")
    assert not recwarn.list


def test_json_becomes_what_the_field_holds() -> None:
    parser = AsyncEngineArgs.add_cli_args(argparse.ArgumentParser())
    flags = ["--hf-overrides", '{"a": 1}', "--simulation", '{"step_us": 5}', "--enable-log-requests"]
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(flags))
    assert args == AsyncEngineArgs(
        hf_overrides={"a": 1}, simulation=SimulationConfig(step_us=5), enable_log_requests=True
    )
    with pytest.raises(SystemExit):
        parser.parse_args(["--hf-overrides", "[1]"])


def test_parsed_dicts_are_not_shared_with_the_defaults() -> None:
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args([])
    parsed.hf_overrides["changed"] = 1
    assert EngineArgs().hf_overrides == {}


def test_flexible_parser_takes_both_spellings() -> None:
    parser = SameParser()
    parser.add_argument("--with_underscore")
    parser.add_argument("--with-dash")
    parser.add_argument("-s", dest="short")
    parser.add_argument("rest", nargs="*")
    for first, second in (("--with-underscore", "--with_dash"), ("--with_underscore", "--with-dash")):
        args = parser.parse_args([first, "a_b", f"{second}=--c_d", "-s", "x_y", "--", "--with_dash"])
        assert (args.with_underscore, args.with_dash, args.short) == ("a_b", "--c_d", "x_y")
        assert args.rest == ["--with_dash"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--with"])  # no abbreviations


def test_flexible_parser_in_commands_and_from_sys_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = FlexibleArgumentParser()
    parser.add_subparsers().add_parser("go").add_argument("--so-far", type=int)
    monkeypatch.setattr("sys.argv", ["program", "go", "--so_far", "3"])
    assert parser.parse_args().so_far == 3
    assert parser.parse_known_args(["go", "--un_known"])[1] == ["--un_known"]
