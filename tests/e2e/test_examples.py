"""Every example runs, and what it prints is what it promises."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tercet.errors import ModelNotFoundError
from tercet.model_source import resolve_model
from tests.e2e.server_tools import serve
from tests.tercet import cli_tools
from tests.tercet.cli_tools import ROOT, environment

EXAMPLES = ROOT / "examples"
MAX_LINES = 65

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(resolve_model(None).path)
    except ModelNotFoundError:
        pytest.skip("the default model is not installed; `make install` brings it")


@pytest.fixture(scope="module")
def address(model: str) -> Iterator[str]:
    """An engine for the examples that can attach to one."""
    limits = ["--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "128M"]
    with cli_tools.engine(model, *limits) as (_, address):
        yield address


@pytest.fixture(scope="module")
def url(address: str) -> Iterator[str]:
    """Base URL of a server for the examples that are clients of one."""
    with serve("--connect", address) as server:
        yield f"{server.url}/v1"


def run(name: str, *args: str) -> str:
    """What an example prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        capture_output=True,
        text=True,
        env=environment(TERCET_LOGGING_LEVEL="WARNING"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """Every number that the pattern's group finds."""
    return [float(found) for found in re.findall(pattern, text)]


# On an engine of their own


def offline_generate(model: str) -> None:
    out = run("offline_generate.py", "--model", model)
    assert len(out.splitlines()) == 3
    assert "'The capital of France is' -> ' Paris" in out
    assert "five, six, seven" in out


def offline_chat(model: str) -> None:
    out = run("offline_chat.py", "--model", model)
    assert "Paris" in out.split("user: And")[0]
    assert "Rome" in out.split("user: And")[1]
    first, second = numbers(r"\((\d+) of", out)
    assert first == 0 < second


def parallel_sampling(model: str) -> None:
    out = run("parallel_sampling.py", "--model", model)
    assert re.findall(r": (True|False)$", out, re.MULTILINE) == ["True"] * 3


def logprobs(model: str) -> None:
    out = run("logprobs.py", "--model", model)
    assert out.startswith("' Paris' ")
    assert numbers(r"rank (\d+)", out) == [1] * 5  # greedy
    for line in out.splitlines()[:5]:
        shares = numbers(r"([\d.]+)%", line)
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 100.1
    sense, nonsense = numbers(r"perplexity ([\d.]+)", out)
    assert sense < nonsense / 10


def stop_strings(model: str) -> None:
    plain, stopped, included = run("stop_strings.py", "--model", model).splitlines()
    text = plain.split("): ")[1].strip("'")
    head = text[: text.index("seven")]
    assert stopped == f"stop (stop, 'seven'): '{head}'"
    assert included == f"stop, included (stop, 'seven'): '{head}seven'"


def prefix_caching(model: str) -> None:
    out = run("prefix_caching.py", "--model", model)
    first, second, salted, reset = numbers(r": (\d+) of \d+ cached", out)
    assert (first, salted, reset) == (0, 0, 0)
    assert second > 100
    answers = [line.rpartition(": ")[2] for line in out.splitlines()]
    assert answers[1] == answers[2] == answers[3]  # a cached prefix changes no token


def beam_search(model: str) -> None:
    out = run("beam_search.py", "--model", model)
    greedy, *beams = numbers(r"(-[\d.]+):", out)
    assert len(beams) == 4
    assert beams == sorted(beams, reverse=True)
    assert beams[0] >= greedy


# On the shared engine


def async_stream(address: str) -> None:
    out = run("async_stream.py", "--connect", address)
    for name, words in (("geography", " Paris"), ("counting", " five, six, seven")):
        pieces = re.findall(rf"^{name}: \+'(.*)'$", out, re.MULTILINE)
        assert len(pieces) > 4
        assert "".join(pieces).startswith(words)
    first_words = [line.split(":")[0] for line in out.splitlines()]
    # One began before the other ended.
    assert first_words.index("counting") < len(first_words) - first_words[::-1].index("geography")
    assert first_words.index("geography") < len(first_words) - first_words[::-1].index("counting")


def connect_two_services(address: str) -> None:
    out = run("connect_two_services.py", "--connect", address)
    assert "geographer says 'The capital of France is Paris" in out
    assert "storyteller says 'Once upon a time, there was a " in out
    assert "served at the same time: True" in out


def cancel(address: str) -> None:
    out = run("cancel.py", "--connect", address)
    assert numbers(r"left: ended after (\d+) tokens, None", out)[0] < 100
    assert "cancelled: True" in out
    assert numbers(r"aborted: ended after (\d+) tokens, abort", out)[0] < 800
    assert "unfinished requests: 0\nall memory free again: True" in out


# Against a server on the shared engine


def openai_chat(url: str) -> None:
    out = run("openai_chat.py", "--url", url)
    assert re.search(r"^answer: '.*Paris.*' \((stop|length)\)$", out, re.MULTILINE)
    pieces, tokens = numbers(r"(\d+) (?:pieces|tokens)", out)
    assert 4 < pieces <= tokens
    assert "refused: temperature" in out


def openai_many(url: str) -> None:
    out = run("openai_many.py", "--url", url)
    assert re.search(r"^France:' Paris", out, re.MULTILINE)
    assert len(numbers(r"([\d.]+) s", out)) == 2


# On a simulated engine


def priorities() -> None:
    out = run("priorities.py")
    assert "finished: first, alarm, alarm 2, chat, report, backup" in out


def simulated_engine() -> None:
    out = run("simulated_engine.py", "--step-us", "4000", "--token-us", "10")
    rows = [line.split() for line in out.splitlines()[1:]]
    rates, latencies = [float(row[1]) for row in rows], [float(row[2]) for row in rows]
    assert rates[2] > 2 * rates[0]  # 16 at a time against one
    assert latencies[2] < latencies[0]
    # One at a time takes 16 steps for each of 32 requests, at least.
    assert rates[0] <= 1e6 / 4000


OWN = [offline_generate, offline_chat, parallel_sampling, logprobs, stop_strings, prefix_caching, beam_search]
SHARED = [async_stream, connect_two_services, cancel]
SERVED = [openai_chat, openai_many]
SIMULATED = [priorities, simulated_engine]


@pytest.mark.parametrize("check", OWN, ids=lambda check: check.__name__)
def test_example_with_an_engine_of_its_own(check: Callable[[str], None], model: str) -> None:
    check(model)


@pytest.mark.parametrize("check", SHARED, ids=lambda check: check.__name__)
def test_example_that_attaches(check: Callable[[str], None], address: str) -> None:
    check(address)


@pytest.mark.parametrize("check", SERVED, ids=lambda check: check.__name__)
def test_example_of_a_client(check: Callable[[str], None], url: str) -> None:
    check(url)


@pytest.mark.parametrize("check", SIMULATED, ids=lambda check: check.__name__)
def test_example_without_a_model(check: Callable[[], None]) -> None:
    check()


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {check.__name__ for check in (*OWN, *SHARED, *SERVED, *SIMULATED)}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_says_what_it_shows(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"python examples/{path.name}" in docstring
