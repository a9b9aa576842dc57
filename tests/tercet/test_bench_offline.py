"""`tercet bench throughput` and `tercet bench latency` on a simulated engine whose steps take a known time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tercet.bench.offline import latency_result, throughput_result, throughput_text
from tests.tercet.cli_tools import run, simulated_flags, write_tokenizer

STEP_S = 0.01


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return simulated_flags(write_tokenizer(tmp_path_factory.mktemp("tokenizer")), step_us=STEP_S * 1e6)


@pytest.mark.parametrize("mode", [[], ["--async-engine"]])
def test_throughput_counts_every_token(mode: list[str], flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = run(
        *(
            "bench",
            "throughput",
            *flags,
            *mode,
            "--num-prompts",
            "12",
            "--input-len",
            "20",
            "--output-len",
            "8",
        ),
        *("--n", "2", "--output-json", str(path), "--disable-tqdm"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert (result["num_requests"], result["num_prompt_tokens"], result["num_output_tokens"]) == (
        12,
        240,
        192,
    )
    assert result["total_num_tokens"] == 432
    assert result["elapsed_time"] >= 8 * STEP_S
    assert result["tokens_per_second"] == pytest.approx(432 / result["elapsed_time"])
    assert "Total num output tokens:  192" in done.stdout


def test_latency_is_that_of_the_steps(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = run(
        *("bench", "latency", *flags, "--input-len", "16", "--output-len", "10", "--batch-size", "3"),
        *("--num-iters-warmup", "1", "--num-iters", "4", "--output-json", str(path), "--disable-tqdm"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert len(result["latencies"]) == 4
    assert min(result["latencies"]) >= 10 * STEP_S
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 4)
    assert sorted(map(int, result["percentiles"])) == [10, 25, 50, 75, 90, 99]
    assert f"Avg latency: {result['avg_latency']} seconds" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["throughput", "--input-len", "2000"], "input_len: prompt and answer of 2128 tokens exceed"),
        (["latency", "--input-len", "1000"], "input_len: prompt and answer of 1128 tokens exceed"),
        (["throughput", "--n", "0"], "n: must be at least 1"),
        (["latency", "--num-iters", "0"], "num_iters: must be at least 1"),
        (["latency", "--batch-size", "0"], "batch_size: must be at least 1"),
        (["throughput", "--dataset-name", "custom"], "dataset_path: is needed"),
    ],
)
def test_wrong_arguments_are_named(args: list[str], words: str, flags: list[str]) -> None:
    done = run("bench", *args, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_figures_are_quotients() -> None:
    result = throughput_result(10, 2.0, 300, 100)
    assert (result["requests_per_second"], result["tokens_per_second"]) == (5.0, 200.0)
    assert throughput_text(result).startswith(
        "Throughput: 5.00 requests/s, 200.00 total tokens/s, 50.00 output tokens/s\n"
    )
    assert latency_result([1.0, 3.0])["percentiles"]["50"] == 2.0
