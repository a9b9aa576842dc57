"""The live page: its files, its figures, and itself in a browser."""

from __future__ import annotations

import re
import signal
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

from tercet.frontend.server.page import FILES, read_file
from tests.e2e.server_tools import ServerProcess, serve, until
from tests.frontend.server.browser import CHROMIUM, Page, open_browser
from tests.tercet.cli_tools import simulated_flags, write_tokenizer

MIN_CONTRAST = 4.5  # WCAG 2.2, level AA, for text
PAIRS = (("text", "back"), ("text", "card"), ("soft", "card"), ("soft", "back"), ("card", "accent"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with serve(*simulated_flags(folder, step_us=10_000)) as running:
        yield running
        assert running.stop(signal.SIGTERM)[0] == 0


def fetch(url: str) -> tuple[dict[str, str], str]:
    with urllib.request.urlopen(url, timeout=30) as response:
        return {name.lower(): value for name, value in response.headers.items()}, response.read().decode()


# ---- files


class _Elements(HTMLParser):
    """Ids, labels and references of a document."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.controls: set[str] = set()
        self.labelled: set[str] = set()
        self.references: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.append(values["id"])
        if tag in ("input", "textarea", "select"):
            self.controls.add(values["id"])
        if tag == "label":
            self.labelled.add(values["for"])
        if tag == "svg":
            assert values["role"] == "img"
            assert "aria-labelledby" in values
        if "aria-labelledby" in values:
            self.references.append(values["aria-labelledby"])
        self.links += [values[name] for name in ("src", "href") if name in values]


def test_the_page_is_whole_and_loads_nothing_from_elsewhere() -> None:
    elements = _Elements()
    elements.feed(read_file("index.html").decode())
    assert len(set(elements.ids)) == len(elements.ids)
    assert elements.controls == elements.labelled, "every control has a label"
    assert set(elements.references) <= set(elements.ids)
    assert sorted(elements.links) == ["data:,", "page/page.css", "page/page.js"]
    script = read_file("page.js").decode()
    named = re.findall(r'(?:byId|set)\("([\w-]+)"', script)
    assert len(named) > 15
    assert set(named) <= set(elements.ids)
    for name in FILES:
        text = read_file(name).decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text
        assert "innerHTML" not in text, "text of a model is no markup"


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", read_file("page.css").decode(), re.DOTALL)[scheme]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for front, back in PAIRS:
        bright, dim = sorted((luminance(colors[front]), luminance(colors[back])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= MIN_CONTRAST, (front, back)


def test_files_are_served_with_a_policy(server: ServerProcess) -> None:
    paths = {"/": "index.html", "/page/page.css": "page.css", "/page/page.js": "page.js"}
    for path, name in paths.items():
        headers, body = fetch(server.url + path)
        assert (headers["content-type"], body) == (FILES[name], read_file(name).decode())
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


# ---- figures


def chat(server: ServerProcess, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "some words"}], "ignore_eos": True, **fields}
    status, answer = server.post("/v1/chat/completions", **body)
    assert status == 200, answer
    return answer


def test_figures_follow_the_engine(server: ServerProcess) -> None:
    before = server.get("/page/data")[1]
    usage = chat(server, max_tokens=20)["usage"]

    def grown() -> bool:
        data = server.get("/page/data")[1]
        return bool(data["generation_tokens"] == before["generation_tokens"] + usage["completion_tokens"])

    until(grown)  # figures may be half a second old
    data = server.get("/page/data")[1]
    assert data["model"] == server.model
    assert data["prompt_tokens"] == before["prompt_tokens"] + usage["prompt_tokens"]
    assert (data["running"], data["waiting"]) == (0, 0)
    steps = data["steps"]
    assert len({len(column) for column in steps.values()}) == 1
    assert steps["step"] == list(range(steps["step"][0], steps["step"][-1] + 1))
    assert max(steps["wait_us"]) > 8000, "the simulated step"
    assert [(f["serves_http"], f["running"]) for f in data["frontends"]] == [(True, 0)]
    assert data["queues"]["core_waiting"] == 0


def test_figures_without_steps(tmp_path: Any) -> None:
    with serve(*simulated_flags(write_tokenizer(tmp_path))) as idle:
        data = idle.get("/page/data")[1]
        assert data["steps"]["step"] == []
        assert data["generation_tokens"] == 0


# ---- in a browser


@pytest.fixture
def page(server: ServerProcess) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    with open_browser() as found:
        found.resize(1280, 900)
        found.open(server.url + "/")
        yield found
        assert found.problems == []


def ask(page: Page, words: str, max_tokens: int) -> None:
    page.value(
        f"document.getElementById('max-tokens').value = {max_tokens};"
        "document.getElementById('temperature').value = 0;"  # the same answer each time
        f"document.getElementById('prompt').value = {words!r};"
        "document.getElementById('form').requestSubmit()"
    )


def test_the_page_chats_and_draws(page: Page, server: ServerProcess) -> None:
    page.until("document.getElementById('status').textContent === 'connected'")
    assert page.text("model") == server.model
    ask(page, "some words", 40)
    page.until("document.querySelectorAll('#messages li').length === 2")
    page.until(
        "/^\\d+ tokens, first after \\d+ ms, [\\d.]+\\/s$/.test(document.getElementById('speed').textContent)"
    )
    answer: str = page.value("document.querySelector('#messages li.assistant .body').textContent")
    assert answer.strip()
    page.until("!document.getElementById('send').disabled && document.getElementById('stop').disabled")
    page.until("document.querySelectorAll('#step-chart rect').length >= 40")
    page.until("document.querySelector('#rate-chart polyline')?.getAttribute('points').includes(' ')")
    assert page.value("document.querySelectorAll('#frontends tr').length") == 1
    assert page.value("document.querySelectorAll('#queues dt').length") >= 6
    assert re.fullmatch(r"median [\d.]+ ms, longest [\d.]+ ms", page.text("step-text"))


def test_a_running_answer_is_shown_as_it_comes_and_can_be_stopped(page: Page, server: ServerProcess) -> None:
    ask(page, "words here", 900)
    page.until("document.querySelector('#messages li.assistant .body')?.textContent.length > 5")
    page.until("document.getElementById('running').textContent === '1'")
    assert page.value("document.getElementById('send').disabled")
    page.value("document.getElementById('stop').click()")
    page.until("!document.getElementById('send').disabled")
    until(lambda: server.get("/page/data")[1]["running"] == 0)
    page.value("document.getElementById('clear').click()")
    assert page.value("document.getElementById('messages').children.length") == 0


def test_colors_follow_the_scheme(page: Page) -> None:
    backgrounds = {}
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        backgrounds[scheme] = page.value("getComputedStyle(document.body).backgroundColor")
    assert backgrounds == {"light": "rgb(250, 250, 248)", "dark": "rgb(20, 24, 27)"}
    page.resize(400, 800)  # a telephone: one column, nothing wider than the window
    assert page.value("document.documentElement.scrollWidth") <= 400
