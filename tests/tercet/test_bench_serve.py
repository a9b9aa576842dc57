"""`tercet bench serve` against a server whose timing is known: figures, files, errors, several processes."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.sse_server import Behaviour, SseServer, serving
from tercet.bench.datasets import BenchPrompt
from tercet.bench.http_client import Connection, Server, get
from tercet.bench.load_process import run_load, split
from tercet.bench.metrics import Selection
from tercet.bench.serve import ENDPOINTS, RunOptions, Target, Traffic, benchmark
from tercet.bench.stream import RequestResult, StreamRecorder
from tercet.cli import main
from tercet.errors import ConfigError, TercetError
from tests.tercet.cli_tools import ROOT, environment, write_tokenizer

SLACK_S = 1.5  # a busy machine; what is compared is at least as long
SELECTION = Selection(("ttft", "tpot", "itl", "e2el"), (50, 90, 99))
DETAILED = RunOptions(keep_text=True)


def target(server: SseServer, backend: str = "openai", **options: Any) -> Target:
    where = Server("127.0.0.1", server.port)
    return Target(server=where, backend=backend, path=ENDPOINTS[backend], model="words", **options)


def measure(
    server: SseServer,
    output_lens: Sequence[int],
    traffic: Traffic | None = None,
    options: RunOptions = DETAILED,
    selection: Selection = SELECTION,
    **of_target: Any,
) -> dict[str, Any]:
    prompts = [BenchPrompt(f"prompt {index}", 5, length) for index, length in enumerate(output_lens)]
    return asyncio.run(
        benchmark(
            target(server, **of_target),
            prompts,
            traffic or Traffic(),
            selection,
            options,
            None,
            lambda n: None,
        )
    )


# ---- figures


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
@pytest.mark.parametrize("framing", ["chunked", "close", "split"])
def test_figures_are_those_of_the_server(backend: str, framing: str) -> None:
    behaviour = Behaviour(first_s=0.05, gap_s=0.02, framing=framing, early_role=True, closing_chunk=True)
    with serving(behaviour) as server:
        result = measure(server, [4, 6, 2], backend=backend)
        exchanges = sorted(
            server.exchanges, key=lambda one: int(one.headers["x-request-id"].partition("-")[2])
        )
    assert (result["completed"], result["failed"], result["errors"]) == (3, 0, ["", "", ""])
    assert (result["total_input_tokens"], result["output_lens"]) == (15, [4, 6, 2])
    assert result["generated_texts"] == [" word" * n for n in (4, 6, 2)]
    for exchange, start_s, ttft_s, itls_s in zip(
        exchanges, result["start_times"], result["ttfts"], result["itls"], strict=True
    ):
        received = np.cumsum([start_s + ttft_s, *itls_s])
        late = received - np.array(exchange.sent_s)  # the same clock
        assert len(late) == len(exchange.sent_s)
        assert (late > 0).all() and np.median(late) < SLACK_S
    assert 50 <= result["p50_ttft_ms"] < 50 + SLACK_S * 1e3
    assert 15 <= result["mean_tpot_ms"] < 20 + SLACK_S * 1e3
    assert 15 <= result["mean_itl_ms"] < 20 + SLACK_S * 1e3
    assert result["max_concurrent_requests"] == server.max_running == 3
    assert result["p99_e2el_ms"] >= 50 + 5 * 20 - 1


def test_throughputs_are_counts_over_duration() -> None:
    with serving(Behaviour(first_s=0.05, gap_s=0.01)) as server:
        result = measure(server, [5] * 8, Traffic(max_concurrency=4))
    duration = result["duration"]
    assert 2 * (0.05 + 4 * 0.01) <= duration < 2 * (0.05 + 4 * 0.01) + 2 * SLACK_S
    assert result["request_throughput"] == pytest.approx(8 / duration)
    assert result["output_throughput"] == pytest.approx(40 / duration)
    assert result["total_token_throughput"] == pytest.approx((40 + 8 * 5) / duration)
    assert 20 <= result["max_output_tokens_per_s"] <= 40
    assert server.max_running == result["max_concurrent_requests"] == 4
    assert sorted(result["queue_times"])[3] < SLACK_S and sorted(result["queue_times"])[4] > 0.05


def test_chunks_of_several_tokens_count_as_the_server_says() -> None:
    with serving(Behaviour(gap_s=0.03, tokens_per_chunk=4)) as server:
        result = measure(server, [10])
    assert result["output_lens"] == [10]
    assert len(result["itls"][0]) == 2  # 4 + 4 + 2 tokens
    expected = 1e3 * sum(result["itls"][0]) / 9
    assert result["mean_tpot_ms"] == pytest.approx(expected, rel=0.01, abs=1)


def test_without_usage_chunks_are_counted() -> None:
    with serving(Behaviour(usage=False)) as server:
        assert measure(server, [3, 5])["output_lens"] == [3, 5]


def test_crlf_streams_are_read() -> None:
    with serving(Behaviour(line_end="\r\n", framing="split")) as server:
        result = measure(server, [3])
    assert (result["output_lens"], result["generated_texts"]) == ([3], [" word word word"])


def test_goodput_counts_requests_that_keep_every_objective() -> None:
    with serving(Behaviour(first_s=0.01, gap_s=0.1)) as server:
        selection = Selection(("ttft",), (99,), {"ttft": 5000.0, "e2el": 330.0})
        result = measure(server, [2, 2, 6], selection=selection)  # about 110, 110 and 510 ms
    assert result["request_goodput"] == pytest.approx(2 / result["duration"])
    assert "mean_tpot_ms" not in result


def test_requests_are_as_asked_for() -> None:
    with serving() as server:
        measure(server, [3], ignore_eos=True, extra_body={"temperature": 0.5, "model": "other"}, logprobs=2)
        measure(server, [3], backend="openai-chat", logprobs=2)
    completion, chat = server.exchanges
    assert completion.body == {
        "model": "other",
        "prompt": "prompt 0",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "logprobs": 2,
        "temperature": 0.5,
    }
    assert chat.path == "/v1/chat/completions"
    assert chat.body["messages"] == [{"role": "user", "content": "prompt 0"}]
    assert (chat.body["max_completion_tokens"], chat.body["top_logprobs"]) == (3, 2)


def test_rate_spreads_the_requests() -> None:
    with serving() as server:
        result = measure(server, [1] * 20, Traffic(request_rate=40.0, burstiness=5.0))
    starts = np.array(result["start_times"])
    assert (np.diff(starts) > 0).all()
    assert 0.5 - 0.15 < result["duration"] < 0.5 + SLACK_S


def test_warmups_are_not_measured() -> None:
    with serving() as server:
        result = measure(server, [2, 3], options=RunOptions(num_warmups=3))
        assert len(server.exchanges) == 5
    assert result["completed"] == 2
    assert result["generated_texts"] == ["", ""]  # not asked to keep them


# ---- what goes wrong


def test_failures_are_counted_and_told_apart() -> None:
    def status_of(body: dict[str, Any]) -> int:
        return {"prompt 1": 503, "prompt 3": 400}.get(body["prompt"], 200)

    with serving(Behaviour(status_of=status_of)) as server:
        result = measure(server, [2] * 5)
    assert (result["completed"], result["failed"]) == (3, 2)
    assert result["output_lens"] == [2, 0, 2, 0, 2]
    assert result["errors"][1].startswith("HTTP 503: ") and "refused with 503" in result["errors"][1]
    assert result["errors"][3].startswith("HTTP 400: ")
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (15, 6)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Behaviour(error_after=2), "error in the stream: .*the engine fell over"),
        (Behaviour(die_after=2), "the connection ended in the middle of the answer"),
        (Behaviour(die_after=2, framing="close"), "the stream ended before its end"),
    ],
)
def test_broken_streams_are_failures(behaviour: Behaviour, words: str) -> None:
    with serving(behaviour) as server:
        result = measure(server, [5])
    assert (result["completed"], result["failed"], result["duration"]) == (0, 1, 0)
    (error,) = result["errors"]
    assert re.search(words, error)


def test_no_server_is_a_failure_of_each_request() -> None:
    with serving() as server:
        gone = target(server)
    prompts = [BenchPrompt("x", 1, 1)] * 2
    result = asyncio.run(benchmark(gone, prompts, Traffic(), SELECTION, DETAILED, None, lambda n: None))
    assert result["failed"] == 2
    assert "cannot connect to 127.0.0.1" in result["errors"][0]


def test_connection_closed_while_idle_is_replaced() -> None:
    async def twice(server: SseServer) -> list[str]:
        plan_of = target(server)
        prompts = [BenchPrompt("x", 1, 1)] * 3
        result = await benchmark(
            plan_of, prompts, Traffic(max_concurrency=1), SELECTION, DETAILED, None, lambda n: None
        )
        errors: list[str] = result["errors"]
        return errors

    with serving(Behaviour(framing="close")) as server:
        assert asyncio.run(twice(server)) == ["", "", ""]
        assert server.num_connections == 3
    with serving() as server:
        assert asyncio.run(twice(server)) == ["", "", ""]
        assert server.num_connections == 1  # kept alive


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 two\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"H" * 70_000,
    ],
)
def test_answers_that_are_not_http_fail(answer: bytes) -> None:
    async def exchange() -> None:
        async def answer_with(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            await reader.read()
            writer.close()

        async with await asyncio.start_server(answer_with, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            await asyncio.wait_for(get(Server("127.0.0.1", port), "/"), 10)

    with pytest.raises(Exception, match=r"the answer is not HTTP/1\.1"):
        asyncio.run(exchange())


def test_interim_answers_and_trailers_are_passed_over() -> None:
    """RFC 9112: 1xx answers come before the real one; a trailer ends a chunked body."""

    class Answer:
        status, body = 0, b""

        def on_head(self, status: int, now: float) -> None:
            self.status = status

        def on_body(self, data: bytes, now: float) -> None:
            self.body += data

    class Transport(asyncio.WriteTransport):
        def write(self, data: object) -> None:
            pass

        def is_closing(self) -> bool:
            return False

    data = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5;ext=1\r\nhello\r\n1\r\n!\r\n0\r\nX-Trailer: 1\r\n\r\n"
    )

    async def parse(step: int) -> tuple[int, bytes]:
        connection, answer = Connection(), Answer()
        connection.connection_made(Transport())
        exchange = asyncio.create_task(connection.exchange(b"", answer))
        await asyncio.sleep(0)
        for start in range(0, len(data), step):
            connection.data_received(data[start : start + step])
        await asyncio.wait_for(exchange, 5)
        return answer.status, answer.body

    for step in (1, 2, 7, len(data)):
        assert asyncio.run(parse(step)) == (200, b"hello!")


def test_recorder_keeps_comments_reasoning_and_tool_calls_apart() -> None:
    recorder = StreamRecorder()
    recorder.on_head(200, 0.0)
    lines = [
        ": keep-alive",
        'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}',
        'event: x\ndata: {"choices": [{"delta": {"reasoning_content": "hm"}}]}',
        'data: {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}',
        'data: {"choices": [{"delta": {"content": ""}}]}',
        'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}',
        "data: [DONE]",
    ]
    for now, line in enumerate(lines, 1):
        recorder.on_body(f"{line}\n\n".encode(), float(now))
    result = recorder.result(0, 1.0, 0.0, keep_text=True)
    assert (result.token_times_s, result.end_s, result.text, result.error) == ([3.0, 4.0, 5.0], 6.0, "hm", "")


# ---- several processes


def test_processes_share_the_load_and_give_one_result() -> None:
    with serving(Behaviour(first_s=0.05, gap_s=0.01)) as server:
        done: list[int] = []
        plan_target = target(server)
        prompts = [BenchPrompt(f"prompt {index}", 5, 3 + index) for index in range(9)]
        options = RunOptions(num_client_processes=3, keep_text=True)
        result = asyncio.run(
            benchmark(plan_target, prompts, Traffic(max_concurrency=7), SELECTION, options, None, done.append)
        )
        assert server.max_running <= 7
    assert result["output_lens"] == [3 + index for index in range(9)]
    assert result["generated_texts"] == [" word" * (3 + index) for index in range(9)]
    assert sum(done) == 9
    assert 50 <= result["p50_ttft_ms"] < 50 + SLACK_S * 1e3  # one clock


def test_plan_is_split_without_loss() -> None:
    from tercet.bench.load import LoadPlan, PlannedRequest

    requests = [PlannedRequest(index, 0.0, b"", "") for index in range(10)]
    plan = LoadPlan(server=Server("h", 1), path="/", requests=requests, max_concurrency=6)
    parts = split(plan, 4)
    assert sorted(request.index for part in parts for request in part.requests) == list(range(10))
    assert [part.max_concurrency for part in parts] == [2, 2, 1, 1]
    assert len(split(plan, 100)) == 6


def test_client_process_leaves_with_its_parent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tercet.bench.load_process"],
        stdin=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 1


def test_client_process_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from tercet.bench.load import LoadPlan, PlannedRequest

    monkeypatch.setattr(sys, "executable", "/bin/false")
    requests = [PlannedRequest(index, 0.0, b"", "") for index in range(2)]
    plan = LoadPlan(server=Server("127.0.0.1", 1), path="/", requests=requests)
    with pytest.raises(TercetError, match="a client process ended with exit code 1"):
        asyncio.run(run_load(plan, 2))


# ---- the command


def bench(server: SseServer, *args: str) -> int:
    common = [
        "--port",
        str(server.port),
        "--random-vocab-size",
        "100",
        "--random-output-len",
        "4",
        "--disable-tqdm",
    ]
    return main(["bench", "serve", *common, *args])


def test_command_prints_the_table_and_saves_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Behaviour(first_s=0.01)) as server:
        code = bench(
            server,
            *(
                "--num-prompts",
                "6",
                "--random-input-len",
                "7",
                "--save-result",
                "--result-dir",
                str(tmp_path),
            ),
            *("--metadata", "gpu=none", "--goodput", "ttft:9000", "--max-concurrency", "3"),
            *(
                "--header",
                "X-Team=blue",
                "--percentile-metrics",
                "ttft,itl",
                "--metric-percentiles",
                "25,99.9",
            ),
        )
    assert code == 0
    shown = capsys.readouterr().out
    figures = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in shown.splitlines())
    }
    assert figures["Successful requests"] == "6"
    assert figures["Total generated tokens"] == "24"
    assert figures["Total input tokens"] == "42"
    assert "P99.9 ITL (ms)" in figures and "Mean TPOT (ms)" not in figures
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("openai-infqps-concurrency3-words-root-")
    saved = json.loads(path.read_text())
    assert (saved["model_id"], saved["gpu"], saved["request_rate"]) == ("words-root", "none", "inf")
    assert f"{saved['p99.9_itl_ms']:.2f}" == figures["P99.9 ITL (ms)"]
    assert f"{saved['request_goodput']:.2f}" == figures["Request goodput (req/s)"]
    assert not {"ttfts", "itls", "errors", "generated_texts"} & set(saved)
    exchange = server.exchanges[0]
    assert exchange.headers["x-team"] == "blue"
    assert exchange.body["model"] == "words"
    assert exchange.body["ignore_eos"] is True
    assert len(exchange.body["prompt"]) == 7 and max(exchange.body["prompt"]) < 100


def test_sweep_makes_a_run_for_each_rate_and_concurrency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        code = bench(
            server,
            *("--num-prompts", "4", "--request-rate", "100", "inf", "--max-concurrency", "1", "2"),
            *("--save-detailed", "--append-result", "--result-filename", str(tmp_path / "all.jsonl")),
        )
    assert code == 0
    saved = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [(one["request_rate"], one["max_concurrency"]) for one in saved] == [
        (100.0, 1),
        (100.0, 2),
        ("inf", 1),
        ("inf", 2),
    ]
    assert all(len(one["ttfts"]) == 4 for one in saved)
    assert len(capsys.readouterr().out.split("E2EL p50 ms")[1].splitlines()) >= 5


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with serving(Behaviour(gap_s=0.001)) as server:
        path = tmp_path / "sweep.png"
        assert bench(server, "--num-prompts", "4", "--max-concurrency", "1", "4", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_text_prompts_have_the_lengths_asked_for(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    from tercet.frontend.tokenizer import Tokenizer, load_bundle

    tokenizer = Tokenizer(load_bundle(folder))
    with serving() as server:
        args = [
            "--port",
            str(server.port),
            "--tokenizer",
            str(folder),
            "--num-prompts",
            "5",
            "--disable-tqdm",
        ]
        assert main(["bench", "serve", *args, "--input-len", "20", "--output-len", "2"]) == 0
    prompts = [exchange.body["prompt"] for exchange in server.exchanges]
    assert [len(tokenizer.encode(prompt)) for prompt in prompts] == [20] * 5
    assert len(set(prompts)) == 5


def test_failed_run_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Behaviour(status_of=lambda body: 500)) as server:
        assert bench(server, "--num-prompts", "3") == 1
    assert "failed: 3 × HTTP 500" in capsys.readouterr().err


def test_ready_check_waits_for_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    started_s = time.monotonic()
    with serving(
        Behaviour(status_of=lambda body: 503 if time.monotonic() < started_s + 0.8 else 200)
    ) as server:
        assert bench(server, "--num-prompts", "1", "--ready-check-timeout-sec", "30") == 0
    with serving(Behaviour(status_of=lambda body: 503)) as server:
        assert bench(server, "--num-prompts", "1", "--ready-check-timeout-sec", "0.1") == 1
    assert "the endpoint is not ready after 0.1 s: HTTP 503" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--request-rate", "0"], "request_rate: must be above 0"),
        (["--max-concurrency", "0"], "max_concurrency: must be at least 1"),
        (["--burstiness", "0"], "burstiness: must be above 0"),
        (["--goodput", "ttft"], "goodput: must be pairs such as ttft:200"),
        (["--goodput", "itl:3"], "goodput: 'itl' is none of ttft, tpot, e2el"),
        (["--percentile-metrics", "ttft,speed"], "percentile_metrics: 'speed' is none of"),
        (["--metric-percentiles", "101"], "metric_percentiles: must be from 0 to 100"),
        (
            ["--backend", "openai-chat"],
            "random_vocab_size: token ids can be sent to a completions endpoint only",
        ),
        (["--endpoint", "/v1/chat/completions"], "endpoint: .* does not go with --backend openai"),
        (["--base-url", "localhost:8000"], "base_url: .*must be a URL such as"),
        (["--header", "X=a\nb"], "header: .*line ends"),
        (["--dataset-name", "custom"], "dataset_path: is needed"),
        (["--dataset-path", "x"], "dataset_path: does not go with --dataset-name random"),
        (["--ramp-up-strategy", "linear"], "ramp_up_start_rps: a ramp-up needs"),
        (["--random-range-ratio", "1"], r"random_range_ratio: must be in \[0, 1\)"),
        (["--num-client-processes", "0"], "num_client_processes: must be at least 1"),
        (["--num-prompts", "0"], "num_prompts: must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        assert bench(server, *args) == 2
        assert server.exchanges == []
    assert re.search(words, capsys.readouterr().err)


def test_missing_tokenizer_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server:
        code = main(["bench", "serve", "--port", str(server.port), "--tokenizer", "/nowhere/at/all"])
    assert code == 2
    assert "Name a folder or .gguf file with --tokenizer" in capsys.readouterr().err


def test_traffic_refuses_a_rate_beside_a_ramp_up() -> None:
    from tercet.bench.arrivals import RampUp

    with pytest.raises(ConfigError, match="request_rate: leave it out"):
        Traffic(request_rate=3.0, ramp_up=RampUp("linear", 1, 2))
    assert math.isinf(Traffic().request_rate)


def test_failed_result_has_no_latency() -> None:
    assert RequestResult(index=0, start_s=1.0, error="x").latency_s == 0
