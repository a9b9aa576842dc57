"""Prompts and arrivals of the benchmarks: lengths, sharing, repeatability, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tercet.bench.arrivals import RampUp, arrival_offsets
from tercet.bench.datasets import DatasetConfig, make_prompts
from tercet.bench.metrics import Sample, peak_concurrency, peak_tokens_per_s
from tercet.bench.plot import pareto_front
from tercet.bench.report import result_path
from tercet.bench.stream import RequestResult
from tercet.errors import ConfigError
from tercet.frontend.tokenizer import Tokenizer, load_bundle
from tests.tercet.cli_tools import TEMPLATE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(load_bundle(write_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


# ---- synthetic


def test_random_text_has_the_lengths_of_the_ratio(tokenizer: Tokenizer) -> None:
    config = DatasetConfig(
        num_prompts=60,
        random_input_len=40,
        random_output_len=10,
        random_range_ratio=0.25,
        random_prefix_len=8,
    )
    prompts = make_prompts(config, tokenizer)
    lengths = [len(tokenizer.encode(prompt.prompt)) for prompt in prompts if isinstance(prompt.prompt, str)]
    assert lengths == [prompt.prompt_len for prompt in prompts]
    assert (min(lengths) >= 38, max(lengths) <= 58, len(set(lengths)) > 5) == (True, True, True)
    assert {prompt.output_len for prompt in prompts} <= set(range(7, 14))
    texts = [str(prompt.prompt) for prompt in prompts]
    assert len({text[:8] for text in texts}) == 1  # the prefix: at least as many characters as tokens
    assert make_prompts(config, tokenizer) == prompts
    assert make_prompts(DatasetConfig(num_prompts=60, seed=1), tokenizer)[0].prompt != prompts[0].prompt


def test_random_token_ids_need_no_tokenizer() -> None:
    config = DatasetConfig(num_prompts=5, random_input_len=30, random_prefix_len=4, random_vocab_size=50)
    prompts = make_prompts(config, None)
    assert [len(prompt.prompt) for prompt in prompts] == [34] * 5
    assert {tuple(prompt.prompt[:4]) for prompt in prompts}.__len__() == 1
    assert max(token for prompt in prompts for token in prompt.prompt if isinstance(token, int)) < 50


def test_prefix_repetition_has_so_many_prefixes() -> None:
    config = DatasetConfig(
        name="prefix_repetition",
        num_prompts=23,
        prefix_repetition_num_prefixes=4,
        prefix_repetition_prefix_len=6,
        prefix_repetition_suffix_len=3,
        prefix_repetition_output_len=9,
        random_vocab_size=1000,
    )
    prompts = make_prompts(config, None)
    prefixes = [tuple(prompt.prompt[:6]) for prompt in prompts]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [5, 6, 6, 6]
    assert {(len(prompt.prompt), prompt.output_len) for prompt in prompts} == {(9, 9)}
    assert prefixes[:4] != prefixes[4:8]  # shuffled


def test_datasets_that_need_a_tokenizer_say_so() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer: --dataset-name random needs one.*--random-vocab-size"):
        make_prompts(DatasetConfig(), None)


# ---- files


def sharegpt(folder: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in pairs]
    path = folder / "sharegpt.json"
    path.write_text(json.dumps([*rows, {"conversations": [{"from": "human", "value": "alone"}]}]))
    return path


def test_sharegpt_takes_first_turns_of_usual_length(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = sharegpt(
        tmp_path,
        ("x", "much too short a question"),
        ("some words that met", "often, often, here"),
        ("q " * 1500, "a b c d"),
    )
    config = DatasetConfig(name="sharegpt", path=path, num_prompts=3)
    prompts = make_prompts(config, tokenizer)
    expected = len(tokenizer.encode("often, often, here"))
    assert [(prompt.prompt, prompt.output_len) for prompt in prompts] == [
        ("some words that met", expected)
    ] * 3
    config = DatasetConfig(
        name="sharegpt", path=path, num_prompts=3, sharegpt_output_len=2, no_oversample=True
    )
    assert [prompt.output_len for prompt in make_prompts(config, tokenizer)] == [2]


def test_custom_lines_are_rendered_for_completions_only(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text('{"prompt": "one", "output_tokens": 3}\n\n{"prompt": "two", "output_tokens": 4}\n')
    config = DatasetConfig(
        name="custom", path=path, num_prompts=2, disable_shuffle=True, custom_output_len=-1
    )
    rendered = make_prompts(config, tokenizer)
    assert "{% for" in TEMPLATE
    assert [prompt.prompt for prompt in rendered] == ["<user>one\n<assistant>", "<user>two\n<assistant>"]
    assert [prompt.output_len for prompt in rendered] == [3, 4]
    assert [prompt.prompt for prompt in make_prompts(config, tokenizer, for_chat=True)] == ["one", "two"]
    (first, _) = make_prompts(config, None)
    assert (first.prompt, first.prompt_len) == ("one", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: "),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: .*prompt"),
        ("\n", "has no prompt that can be used"),
    ],
)
def test_broken_custom_files_are_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "custom.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)dataset_path: .*{words}"):
        make_prompts(DatasetConfig(name="custom", path=path), None)
    with pytest.raises(ConfigError, match="cannot read"):
        make_prompts(DatasetConfig(name="custom", path=tmp_path / "nothing"), None)


# ---- arrivals


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 8.0])
def test_gaps_follow_the_gamma_distribution(burstiness: float) -> None:
    offsets = arrival_offsets(20_000, 50.0, burstiness, seed=3)
    gaps = np.diff([0.0, *offsets])
    assert offsets[-1] == pytest.approx(20_000 / 50.0)
    # Of a gamma distribution of shape k the coefficient of variation is 1/sqrt(k).
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrival_offsets(20_000, 50.0, burstiness, seed=3) == offsets


def test_infinite_rate_sends_at_once() -> None:
    assert arrival_offsets(3, float("inf"), 1.0, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_ramp_up_goes_from_rate_to_rate(strategy: str) -> None:
    ramp_up = RampUp(strategy, 10.0, 1000.0)  # type: ignore[arg-type]
    gaps = np.diff(arrival_offsets(10_000, float("inf"), 50.0, 0, ramp_up))
    assert 1 / np.mean(gaps[:20]) == pytest.approx(10.0, rel=0.25)
    assert 1 / np.mean(gaps[-100:]) == pytest.approx(1000.0, rel=0.1)
    middle = 505.0 if strategy == "linear" else 100.0
    assert 1 / np.mean(gaps[4900:5100]) == pytest.approx(middle, rel=0.15)


def test_impossible_ramps_are_refused() -> None:
    for start, end in ((5, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError, match="ramp_up_start_rps"):
            RampUp("linear", start, end)
    with pytest.raises(ConfigError, match="above 0 for an exponential"):
        RampUp("exponential", 0, 2)


# ---- figures on their own


def sample(start_s: float, times_s: list[float], output_len: int) -> Sample:
    result = RequestResult(index=0, start_s=start_s, end_s=times_s[-1], token_times_s=times_s)
    return Sample(1, output_len, result)


def test_peaks_are_counted_over_requests() -> None:
    samples = [
        sample(10.0, [10.5, 11.2, 11.4], 6),  # two tokens in a chunk
        sample(11.0, [11.9, 12.0], 2),
        sample(11.4, [12.5], 1),  # begins as the first one ends
    ]
    assert peak_tokens_per_s(samples, 10.0) == 5.0  # 4 + 1 in the second second
    assert peak_concurrency(samples) == 2
    assert (peak_tokens_per_s([], 0.0), peak_concurrency([])) == (0.0, 0)


def test_pareto_front_leaves_out_what_is_beaten() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (3.0, 7.0), (4.0, 1.0), (3.0, 2.0)]
    assert pareto_front(points) == [(1.0, 9.0), (3.0, 7.0), (4.0, 1.0)]
    assert pareto_front([]) == []


def test_file_names_tell_runs_apart() -> None:
    result = {
        "label": None,
        "backend": "openai",
        "model_id": "/models/small/",
        "request_rate": 2.5,
        "max_concurrency": 8,
        "date": "20260101-000000",
    }
    alone = result_path(result, directory=None, filename=None, is_one_of_several=False)
    assert alone == Path("openai-2.5qps-concurrency8-small-20260101-000000.json")
    one = result_path(result, directory=Path("out"), filename="a.json", is_one_of_several=True)
    assert one == Path("out/a-2.5qps-concurrency8.json")
    ramp = {
        **result,
        "ramp_up_strategy": "linear",
        "ramp_up_start_rps": 1.0,
        "ramp_up_end_rps": 4.0,
        "label": "x",
    }
    name = result_path(ramp, directory=None, filename=None, is_one_of_several=False).name
    assert name.startswith("x-ramp-up-linear-1qps-4qps-concurrency8-small-")
