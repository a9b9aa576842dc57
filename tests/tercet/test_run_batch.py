"""`tercet run-batch` on a simulated engine, through the server's own application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tercet.cli.batch_file import ENDPOINTS, MAX_IN_FLIGHT, ResultLine, Totals, answer_lines
from tests.tercet.cli_tools import engine, run, simulated_flags, write_tokenizer

pytest.importorskip("starlette")

CHAT = {
    "messages": [{"role": "user", "content": "hello there"}],
    "max_completion_tokens": 5,
    "ignore_eos": True,
}


def line(custom_id: str, url: str, body: dict[str, Any], method: str = "POST") -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with engine(*simulated_flags(folder), "--served-model-name", "words") as (_, where):
        yield where


def run_batch(address: str, folder: Path, lines: list[str]) -> tuple[list[dict[str, Any]], str]:
    source, sink = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines) + "\n")
    done = run("run-batch", "-i", str(source), "-o", str(sink), "--connect", address, "--disable-tqdm")
    assert done.returncode == 0, done.stderr
    return [json.loads(one) for one in sink.read_text().splitlines()], done.stderr


def test_every_line_is_answered_in_order(address: str, tmp_path: Path) -> None:
    lines = [
        line("a", "/v1/chat/completions", {"model": "words", **CHAT}),
        "",
        line(
            "b",
            "/v1/completions",
            {"model": "words", "prompt": "some words", "max_tokens": 3, "ignore_eos": True},
        ),
        line("c", "/v1/embeddings", {"model": "words", "input": "x"}),
        line("d", "/v1/chat/completions", {"model": "words", **CHAT, "temperature": 9}),
        line("e", "/v1/chat/completions", {"model": "other", **CHAT}),
        "{not json",
        line("f", "/v1/completions", {"model": "words", "prompt": "x", "stream": True}),
        line("g", "/v1/completions", {"model": "words", "prompt": "x"}, method="GET"),
        line("h", "/v1/completions", {"model": "words", "prompt": "x", "max_tokens": 2, "ignore_eos": True}),
    ]
    results, stderr = run_batch(address, tmp_path, lines)
    assert [one["custom_id"] for one in results] == ["a", "b", "c", "d", "e", None, "f", "g", "h"]
    chat, completion, embedding, hot, unknown, broken, stream, method, last = results
    assert chat["error"] is None and chat["response"]["status_code"] == 200
    assert chat["response"]["body"]["object"] == "chat.completion"
    assert chat["response"]["body"]["usage"]["completion_tokens"] == 5
    assert chat["response"]["request_id"] == chat["id"]
    assert completion["response"]["body"]["usage"]["completion_tokens"] == 3
    assert completion["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert (embedding["response"], embedding["error"]["code"]) == (None, "invalid_url")
    assert "'/v1/embeddings' is not supported" in embedding["error"]["message"]
    assert hot["response"]["status_code"] == 400
    assert hot["response"]["body"]["error"]["param"] == "temperature"
    assert "temperature" in hot["error"]["message"]
    assert (unknown["response"]["status_code"], unknown["error"]["code"]) == (404, "model_not_found")
    assert broken["error"]["code"] == "invalid_json_line" and "line 7" in broken["error"]["message"]
    assert "stream: a batch has no streams" in stream["error"]["message"]
    assert "must be 'POST'" in method["error"]["message"]
    assert last["error"] is None
    assert "9 lines in" in stderr and "6 failed" in stderr and "10 output tokens" in stderr


@pytest.mark.parametrize("missing", ["custom_id", "method", "url", "body"])
def test_missing_field_is_named(missing: str) -> None:
    whole = json.loads(line("a", ENDPOINTS[0], {}))
    del whole[missing]
    (result,) = answer([json.dumps(whole).encode()])
    assert result.error is not None
    assert missing in result.error.message


def test_wrong_files_are_named_before_anything_starts(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    missing = run("run-batch", "-i", str(source), "-o", str(tmp_path / "out"))
    assert (missing.returncode, "input_file: cannot read" in missing.stderr) == (2, True)
    source.write_text("precious")
    same = run("run-batch", "-i", str(source), "-o", str(source))
    assert (same.returncode, "output_file: " in same.stderr) == (2, True)
    assert source.read_text() == "precious"


# ---- the order and number of what is in flight, with an application of the test's own


class SlowApp:
    """Answers after a moment, the first requests last."""

    def __init__(self) -> None:
        self.running = self.most = self.cancelled = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            body = json.loads((await receive())["body"])
            await asyncio.sleep(body["delay"])
            usage = {"prompt_tokens": 2, "completion_tokens": 3}
            await send({"type": "http.response.start", "status": 200, "headers": []})
            half = json.dumps({"n": body["n"], "usage": usage}).encode()
            await send({"type": "http.response.body", "body": half[:5], "more_body": True})
            await send({"type": "http.response.body", "body": half[5:]})
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


def answer(lines: list[bytes], app: Any = None, max_in_flight: int = MAX_IN_FLIGHT) -> list[ResultLine]:
    async def collect() -> list[ResultLine]:
        return [result async for result in answer_lines(app, lines, max_in_flight)]

    return asyncio.run(collect())


def slow_lines(count: int) -> list[bytes]:
    bodies = ({"n": index, "delay": 0.02 if index % 5 == 0 else 0.001} for index in range(count))
    return [line(str(index), ENDPOINTS[0], body).encode() for index, body in enumerate(bodies)]


def test_concurrency_is_bounded_and_order_is_kept() -> None:
    app, totals = SlowApp(), Totals()
    results = answer(slow_lines(50), app, 7)
    for result in results:
        totals.add(result)
    assert app.most == 7
    assert [result.custom_id for result in results] == [str(index) for index in range(50)]
    assert [json.loads(bytes(result.response.body))["n"] for result in results if result.response] == [
        *range(50)
    ]
    assert (totals.num_prompt_tokens, totals.num_output_tokens, totals.num_failed) == (100, 150, 0)


def test_leaving_early_ends_what_is_running() -> None:
    app = SlowApp()

    first, *rest = slow_lines(20)
    endless = [line(str(index), ENDPOINTS[0], {"n": index, "delay": 60}).encode() for index in range(20)]

    async def leave() -> None:
        results = answer_lines(app, [first, *endless, *rest], 10)
        assert (await anext(results)).custom_id == "0"
        await results.aclose()

    asyncio.run(leave())
    assert (app.running, app.cancelled) == (0, 9)
