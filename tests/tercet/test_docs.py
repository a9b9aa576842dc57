"""The user guide agrees with the code: arguments, defaults, flags, names."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import textwrap
from pathlib import Path

import pytest

import tercet
from tercet import envs
from tercet.cli import COMMANDS, make_parser
from tercet.config import AsyncEngineArgs, EngineArgs
from tercet.engine_flags import GROUPS
from tercet.frontend.outputs import CompletionOutput, RequestOutput
from tercet.frontend.sampling_params import _UNSUPPORTED, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_CODE = [*PAGES, ROOT / "README.md"]


def text_of(name: str) -> str:
    return (DOCS / name).read_text()


def rows(text: str) -> dict[str, str]:
    """First column -> second column of every table row whose first column is one name in code."""
    return {name: value.strip() for name, value in re.findall(r"^\| `(\w+)` \|([^|]*)\|", text, re.MULTILINE)}


def test_engine_args_has_every_argument_with_its_default() -> None:
    documented = rows(text_of("engine_args.md"))
    expected = {}
    for field in dataclasses.fields(AsyncEngineArgs):
        expected[field.name] = repr(getattr(AsyncEngineArgs(), field.name))
    assert documented == expected
    assert len(expected) > len(dataclasses.fields(EngineArgs))


def test_sampling_has_every_field_with_its_default() -> None:
    text = text_of("sampling.md")
    documented = rows(text)
    defaults = SamplingParams()
    fields = [name for name in SamplingParams.__struct_fields__ if name not in _UNSUPPORTED]
    assert set(documented) == set(fields)
    for name in fields:
        value = getattr(defaults, name)
        assert documented[name] == ("CUMULATIVE" if name == "output_kind" else repr(value)), name
    unsupported = text.split("## Known by name only")[1].split("##")[0]
    assert set(re.findall(r"`(\w+)`", unsupported)) == set(_UNSUPPORTED)


def test_offline_has_every_output_field() -> None:
    text = text_of("offline.md")
    for kind in (RequestOutput, CompletionOutput):
        for name in kind.__struct_fields__:
            assert f"`{name}`" in text, name


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def flags_below(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a command and of commands within it."""
    return flags_of(parser).union(*map(flags_below, commands_of(parser).values()))


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for action in found for name, command in action.choices.items()}


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    return commands_of(make_parser())


def test_every_flag_in_the_docs_exists() -> None:
    known = flags_below(make_parser())
    known |= {"--merge"}  # of another program
    for page in [*PAGES, ROOT / "README.md"]:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()):
            assert flag in known, f"{page.name}: {flag}"


def test_cli_page_has_every_command_and_flag() -> None:
    text = text_of("cli.md")
    engine_flags = {"--" + name.replace("_", "-") for group in GROUPS.values() for name in group}
    engine_flags |= {"--no-" + flag[2:] for flag in engine_flags}
    for name, parser in command_parsers().items():
        assert f"## `tercet {name}`" in text
        for flag in flags_of(parser) - engine_flags - {"-h", "--help", "--skip-special-tokens"}:
            assert f"{flag}`" in text or f"{flag} " in text, flag
    assert len(command_parsers()) == len(COMMANDS)


def test_cli_page_has_every_environment_variable() -> None:
    assert set(rows(text_of("cli.md"))) == set(dir(envs))


def test_index_links_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", text_of("index.md")))
    assert linked == {page.name for page in PAGES} - {"index.md"}


def anchors(page: Path) -> set[str]:
    """Anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_headings_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((\w*\.?\w*)#([\w-]+)\)", page.read_text()):
        assert anchor in anchors(DOCS / target if target else page), f"{target}#{anchor}"


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_can_be_parsed_and_imports_what_exists(page: Path) -> None:
    for block in code_blocks(page):
        try:
            tree = ast.parse(block)
        except SyntaxError:  # `await` at top level of an excerpt
            tree = ast.parse("async def excerpt():\n" + textwrap.indent(block, "    "))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "tercet":
                assert all(hasattr(tercet, alias.name) for alias in node.names)


def test_development_names_files_that_exist() -> None:
    for name in re.findall(
        r"`((?:frontend|ipc|core_proc|worker_proc|ops|tercet)/[\w/]+\.py)`", text_of("development.md")
    ):
        assert (ROOT / name).is_file(), name
