"""A request's trace, exported to a collector and joined over frontend, core and worker."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tercet import AsyncEngineArgs, AsyncLLM, ConfigError, SamplingParams, ValidationError
from tercet.config import SimulationConfig
from tercet.frontend.request_log import RequestRecord
from tercet.frontend.tracing import check_endpoint
from tercet.ipc import traceparent
from tests.e2e.server_tools import serve
from tests.frontend.server.otlp_receiver import ReceivedSpan, Receiver, otlp_receiver
from tests.tercet.cli_tools import simulated_flags, write_tokenizer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT}-01"
SERVER_KIND = 2
ERROR_STATUS = 2
SLACK_S = 0.05  # between the clocks of spans that were measured in different processes


def make_args(endpoint: str | None, **fields: Any) -> AsyncEngineArgs:
    return AsyncEngineArgs(
        device="simulated",
        simulation=SimulationConfig(step_us=2000),
        max_model_len=1024,
        otlp_traces_endpoint=endpoint,
        **fields,
    )


def children(receiver: Receiver, span: ReceivedSpan) -> dict[str, ReceivedSpan]:
    found = {s.name: s for s in receiver.spans if s.parent_id == span.span_id}
    assert len(found) == sum(s.parent_id == span.span_id for s in receiver.spans)
    return found


def check_joined(receiver: Receiver, root: ReceivedSpan) -> tuple[ReceivedSpan, ReceivedSpan]:
    """The spans of core and worker below this one, each within its parent."""
    (core,) = children(receiver, root).values()
    below = children(receiver, core)
    assert set(below) == {"queue", "prefill", "decode", "worker"}
    worker = below["worker"]
    assert set(children(receiver, worker)) == {"worker.prefill", "worker.decode"}
    spans = {span.span_id: span for span in receiver.spans}
    inside = [core, *below.values(), *children(receiver, worker).values()]
    for span in inside:
        parent = spans[span.parent_id]
        assert span.trace_id == root.trace_id
        assert parent.start_s - SLACK_S <= span.start_s <= span.end_s <= parent.end_s + SLACK_S, span.name
    assert below["queue"].end_s == pytest.approx(below["prefill"].start_s, abs=1e-4)
    assert below["prefill"].end_s == pytest.approx(below["decode"].start_s, abs=1e-4)
    processes = {span.resource["tercet.process"]: span.resource["process.pid"] for span in [root, *inside]}
    assert set(processes) == {"frontend", "core", "worker"}
    assert len(set(processes.values())) == 3
    return core, worker


def test_a_trace_is_joined_over_three_processes() -> None:
    async def test(endpoint: str) -> None:
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, make_args(endpoint))
        async with engine:
            assert await engine.is_tracing_enabled()
            params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.5, top_p=0.75)
            headers = {"TraceParent": TRACEPARENT, "other": "x"}
            async for _ in engine.generate([1, 2, 3], params, "one", trace_headers=headers):
                pass

    with otlp_receiver() as receiver:
        asyncio.run(test(receiver.endpoint))  # its end exports what is left
    (root,) = receiver.named("llm_request")
    assert (root.trace_id, root.parent_id, root.kind) == (TRACE_ID, PARENT, SERVER_KIND)
    assert root.resource["service.name"] == "tercet"
    assert root.resource["process.pid"] == os.getpid()
    attributes = root.attributes
    expected = {
        "gen_ai.request.id": "one",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.response.model": "simulated",
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 6,
        "gen_ai.usage.num_sequences": 1,
    }
    assert attributes.items() >= expected.items()
    latency = {name.removeprefix("gen_ai.latency."): s for name, s in attributes.items() if "latency" in name}
    assert 0 <= latency["time_in_queue"] < latency["time_to_first_token"] < latency["e2e"]
    assert latency["time_in_model_inference"] == pytest.approx(
        latency["time_in_model_prefill"] + latency["time_in_model_decode"]
    )
    core, worker = check_joined(receiver, root)
    assert core.attributes["tercet.finish"] == "length"
    assert core.attributes["gen_ai.usage.completion_tokens"] == 6
    assert worker.attributes["gen_ai.usage.completion_tokens"] == 6
    assert len(receiver.spans) == 8


def test_a_trace_begins_here_without_a_parent_and_is_left_out_where_its_parent_is_not_sampled() -> None:
    async def test(endpoint: str) -> None:
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, make_args(endpoint))
        async with engine:
            unsampled = {"traceparent": f"00-{TRACE_ID}-{PARENT}-00"}
            params = SamplingParams(max_tokens=2, ignore_eos=True, n=2)
            async for _ in engine.generate([1], params, trace_headers=unsampled):
                pass
            async for _ in engine.generate([1], params, trace_headers={"traceparent": "nonsense"}):
                pass
            with pytest.raises(ValidationError):
                async for _ in engine.generate([10**6], params):
                    pass
            stream = await engine.add_request([1], SamplingParams(max_tokens=500, ignore_eos=True))
            await stream.get()
            stream.close()
            async for _ in engine.generate([1], params, trace_headers=unsampled):
                pass  # the aborted one's row is released by a later plan

    with otlp_receiver() as receiver:
        asyncio.run(test(receiver.endpoint))
    assert TRACE_ID not in {span.trace_id for span in receiver.spans}
    finished, refused, aborted = sorted(receiver.named("llm_request"), key=lambda span: span.start_s)
    assert {span.parent_id for span in (finished, refused, aborted)} == {""}
    assert finished.attributes["gen_ai.usage.completion_tokens"] == 4
    assert [s.parent_id for s in receiver.named("core")].count(finished.span_id) == 2, "one for each of n"
    assert children(receiver, refused) == {}
    (core,) = children(receiver, aborted).values()
    assert core.attributes["tercet.finish"] == "abort"
    assert "worker" in children(receiver, core)


def test_the_trace_of_an_http_request(tmp_path: Path) -> None:
    flags = simulated_flags(write_tokenizer(tmp_path), step_us=500)
    with otlp_receiver() as receiver:
        with serve(*flags, "--otlp-traces-endpoint", receiver.endpoint) as server:
            body = {"model": server.model, "prompt": "some words", "max_tokens": 5, "ignore_eos": True}
            headers = {"traceparent": TRACEPARENT, "content-type": "application/json"}
            url = server.url + "/v1/completions"
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as r:
                assert r.status == 200
            assert server.stop(signal.SIGTERM)[0] == 0
        assert receiver.paths == {"/v1/traces"}
    (root,) = receiver.named("llm_request")
    assert (root.trace_id, root.parent_id) == (TRACE_ID, PARENT)
    check_joined(receiver, root)


# ---- what can be wrong


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://host:1", "http://"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        check_endpoint(endpoint)


def test_endpoints_have_the_path_that_collectors_have() -> None:
    assert check_endpoint("http://h:4318") == "http://h:4318/v1/traces"
    assert check_endpoint("https://h/x/v1/traces") == "https://h/x/v1/traces"


def test_a_collector_that_is_not_there_disturbs_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, make_args("http://127.0.0.1:9"))
        async with engine:
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            outputs = [output async for output in engine.generate([1], params)]
            assert outputs[-1].finished

    with caplog.at_level(logging.CRITICAL, logger="opentelemetry"):
        asyncio.run(test())


def test_opentelemetry_is_loaded_only_where_traces_are_wanted() -> None:
    code = "import sys, tercet.frontend.async_llm, tercet.frontend.tracing; print('opentelemetry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        f"00-{TRACE_ID}-{PARENT}-00",  # not sampled
        f"ff-{TRACE_ID}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID.upper()}-{PARENT}-01",
        f"00-{TRACE_ID}-{PARENT}-01 ",
    ],
)
def test_malformed_traceparents_trace_nothing(text: str) -> None:
    assert traceparent.parse(text) is None


def test_traceparents_are_read_and_written() -> None:
    parent = traceparent.parse(TRACEPARENT)
    assert parent == (TRACE_ID, PARENT)
    assert str(parent) == TRACEPARENT
    assert traceparent.parse(f"01-{TRACE_ID}-{PARENT}-03-more") == parent  # a later version
    assert parent is not None
    assert parent.child().trace_id == TRACE_ID
    assert parent.child().span_id != parent.child().span_id


# ---- the record of a request


def test_one_record_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, make_args(None, enable_log_requests=True))
        async with engine:
            params = SamplingParams(max_tokens=4, ignore_eos=True, n=2)
            async for _ in engine.generate([1, 2], params, "done"):
                pass
            stream = await engine.add_request([1], SamplingParams(max_tokens=500, ignore_eos=True), "left")
            await stream.get()
            stream.close()

    with caplog.at_level("INFO", logger="tercet.frontend.request_log"):
        asyncio.run(test())
    lines = [r.getMessage() for r in caplog.records if r.name == "tercet.frontend.request_log"]
    done, left = (msgspec.json.decode(line.removeprefix("request "), type=RequestRecord) for line in lines)
    assert (done.request_id, done.outcome, done.finish_reasons) == ("done", "finished", ["length"] * 2)
    assert (done.n, done.prompt_tokens, done.output_tokens) == (2, 2, 8)
    assert done.first_token_s is not None
    assert 0 < done.first_token_s < done.e2e_s
    assert "max_tokens=4" in done.params
    assert (left.request_id, left.outcome, left.finish_reasons) == ("left", "aborted", ["abort"])
