"""Any frontend answers for all: totals over frontends that come and leave, as text that Prometheus reads."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tercet import AsyncEngineArgs, AsyncLLM, SamplingParams
from tercet.config import SimulationConfig
from tercet.frontend.metrics import FAMILIES, Counter, Gauge, Histogram, Metric
from tercet.frontend.server.metrics import render
from tests.e2e.server_tools import ServerProcess, serve, until
from tests.tercet.cli_tools import ROOT, simulated_flags, write_tokenizer

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
LABELS = {"model_name", "engine"}


def parse(text: str) -> Samples:
    """Samples by name and labels, the common ones left out; every sample once."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.keys() >= LABELS
            labels = {k: v for k, v in sample.labels.items() if k not in LABELS}
            key = sample.name, tuple(sorted(labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"tercet:{name}", tuple(sorted(labels.items()))]


def kinds(text: str) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


# ---- text


def test_text_is_what_prometheus_reads() -> None:
    labels = {"model_name": 'a"b\\c\nd', "engine": "0"}
    metrics: list[Metric] = [
        Gauge("tercet:num_requests_running", labels, 3.0),
        Counter("tercet:request_success", {**labels, "finished_reason": "stop"}, 5),
        Histogram("tercet:gc_pause_seconds", labels, 3, 0.5, {"0.001": 1, "+Inf": 3}),
        Counter("tercet:request_success", {**labels, "finished_reason": "abort"}, 2**53),
    ]
    text = render(metrics)
    assert text.endswith("\n")
    assert kinds(text) == {
        "tercet:num_requests_running": "gauge",
        "tercet:request_success_total": "counter",
        "tercet:gc_pause_seconds": "histogram",
    }
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["tercet:num_requests_running"].samples[0].labels == labels
    samples = parse(text)
    assert value(samples, "request_success_total", finished_reason="abort") == 2**53
    assert value(samples, "gc_pause_seconds_bucket", le="+Inf") == 3
    assert value(samples, "gc_pause_seconds_sum") == 0.5


# ---- totals over frontends


async def generate(engine: AsyncLLM, number: int, **params: Any) -> None:
    async def one(index: int) -> None:
        prompt = [index + 1] * 10
        async for _ in engine.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True, **params)):
            pass

    await asyncio.gather(*(one(index) for index in range(number)))


async def samples_of(engine: AsyncLLM) -> Samples:
    return parse(render(await engine.get_metrics()))


def test_each_of_three_frontends_answers_for_all_and_for_one_that_has_left() -> None:
    async def test() -> None:
        args = AsyncEngineArgs(device="simulated", simulation=SimulationConfig(), max_model_len=1024)
        first = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
        async with first:
            second = await AsyncLLM.connect(first.address)
            third = await AsyncLLM.connect(first.address)
            await generate(first, 2)
            await generate(second, 3, n=2)
            await generate(third, 5)
            await third.aclose()  # what it had counted since its last report must not be lost
            await asyncio.sleep(1.2)  # reports come once a second
            for engine in (first, second):
                samples = await samples_of(engine)
                assert value(samples, "num_frontends") == 2
                for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
                    assert value(samples, f"{name}_count") == 2 + 3 * 2 + 5, name
                    assert value(samples, f"{name}_bucket", le="+Inf") == 13
                    assert 0 < value(samples, f"{name}_sum") < 60
                assert value(samples, "request_success_total", finished_reason="length") == 13
                assert value(samples, "generation_tokens_total") == 13 * 5
                assert value(samples, "prompt_tokens_total") == 13 * 10
                assert value(samples, "inter_token_latency_seconds_count") == 13 * 4
                assert value(samples, "request_params_n_sum") == 2 + 3 * 2 + 5
                assert value(samples, "step_phase_seconds_count", phase="launch") > 0
            await generate(second, 1)
            samples = await samples_of(second)  # its own figures are never old
            assert value(samples, "time_to_first_token_seconds_count") == 14
            await second.aclose()
            samples = await samples_of(first)
            assert value(samples, "time_to_first_token_seconds_count") == 14, "counters never fall back"

    asyncio.run(test())


def test_load_and_queues_while_requests_wait() -> None:
    async def test() -> None:
        args = AsyncEngineArgs(
            device="simulated",
            simulation=SimulationConfig(step_us=20_000),
            max_model_len=1024,
            max_num_seqs=2,
        )
        engine = await asyncio.to_thread(AsyncLLM.from_engine_args, args)
        async with engine, AsyncLLM.connect(engine.address) as other:
            params = SamplingParams(max_tokens=500, ignore_eos=True)
            streams = [await engine.add_request([1, 2, 3], params) for _ in range(3)]
            await streams[1].get()  # two have the two rows, the third waits
            streams += [await other.add_request([1, 2, 3], params) for _ in range(2)]
            await asyncio.sleep(1.2)  # reports come once a second
            _, metrics = await other.get_telemetry()
            loads = [(f.num_running, f.num_waiting, f.num_requests) for f in metrics.frontends]
            assert loads == [(2, 1, 3), (0, 2, 2)]
            assert metrics.queues["core_waiting"] == 3
            assert metrics.queues["core_worker"] in (1, 2)
            for stream in streams:
                stream.close()

    asyncio.run(test())


# ---- over HTTP


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    with serve(*simulated_flags(folder, step_us=200), "--max-concurrent-requests", "8") as running:
        yield running
        assert running.stop(signal.SIGTERM)[0] == 0


def fetch_text(url: str) -> tuple[str, str]:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.headers["content-type"], response.read().decode()


def test_metrics_has_every_family_from_the_first_moment_on(server: ServerProcess) -> None:
    content_type, text = fetch_text(server.url + "/metrics")
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    shown = {name.removeprefix("tercet:").removesuffix("_total"): kind for name, kind in kinds(text).items()}
    expected = {name.removesuffix("_total"): family.kind for name, family in FAMILIES.items()}
    expected.pop("frontend_requests")  # of whoever is attached
    assert shown.items() >= expected.items()
    parse(text)


def test_metrics_count_http_requests_and_refusals(server: ServerProcess) -> None:
    _, before_text = fetch_text(server.url + "/metrics")
    body = {"model": server.model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
    status, answer = server.post("/v1/completions", **body)
    assert status == 200, answer
    status, answer = server.post("/v1/completions", **body, n=9)  # one above --max-concurrent-requests
    assert status == 429, answer
    before, after = parse(before_text), parse(fetch_text(server.url + "/metrics")[1])

    def grown(name: str, **labels: str) -> float:
        key = f"tercet:{name}", tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("e2e_request_latency_seconds_count") == 1
    assert grown("generation_tokens_total") == 4
    assert grown("admission_rejections_total", reason="overloaded") == 1


def test_load_tells_of_every_frontend(server: ServerProcess) -> None:
    until(lambda: server.get("/load")[1]["server_load"] == 0)
    status, load = server.get("/load")
    assert status == 200
    assert [(f["serves_http"], f["server_load"], f["running"]) for f in load["frontends"]] == [(True, 0, 0)]
    body = {"model": server.model, "prompt": [5], "max_tokens": 900, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as stream:
        stream.readline()
        load = server.get("/load")[1]
        assert load["server_load"] == 1
        assert [f["server_load"] for f in load["frontends"]] == [1]


# ---- the dashboard


def queries() -> dict[str, str]:
    """Every expression of the dashboard, by the title of its panel."""
    dashboard = json.loads((Path(ROOT) / "examples/grafana_dashboard.json").read_text())
    found = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found[f"${variable['name']}"] = variable["query"]["query"]
    return found


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported(server: ServerProcess) -> None:
    samples = parse(fetch_text(server.url + "/metrics")[1])
    names = {name for name, _ in samples}
    labels = {label for _, pairs in samples for label, _ in pairs} | LABELS
    assert len(queries()) >= 15
    for title, query in queries().items():
        used = re.findall(r"tercet:\w+", query)
        assert used, f"{title}: {query}"
        assert set(used) <= names, title
        grouped = {
            name.strip() for group in re.findall(r"by \(([^)]*)\)", query) for name in group.split(",")
        }
        matched = set(re.findall(r"(\w+)=~?\"", query))
        assert grouped | matched <= labels, title
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}"), title
