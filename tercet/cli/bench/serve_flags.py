"""Flags of `tercet bench serve`, under vLLM's names."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from tercet.cli.bench.dataset_flags import add_dataset_flags

SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
)
"""Fields of each request, where given."""


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag, in groups."""
    _add_server(parser.add_argument_group("server"))
    _add_traffic(parser.add_argument_group("traffic"))
    add_dataset_flags(parser)
    _add_requests(parser.add_argument_group("requests"))
    _add_report(parser.add_argument_group("figures and results"))


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=("openai", "vllm", "openai-chat"),
        default="openai",
        help="API of the server: completions (openai, or vllm) or chat completions (default: openai)",
    )
    group.add_argument("--base-url", metavar="URL", help="in place of host and port")
    group.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    group.add_argument("--endpoint", metavar="PATH", help="(default: that of the backend)")
    group.add_argument(
        "--header", nargs="*", type=_pair, metavar="KEY=VALUE", help="headers of every request"
    )
    group.add_argument("--insecure", action="store_true", help="do not verify the server's certificate")
    group.add_argument("--model", help="(default: the first that the server lists)")
    group.add_argument(
        "--served-model-name", metavar="NAME", help="what requests call it (default: the model)"
    )
    group.add_argument("--tokenizer", metavar="PATH", help="makes and counts tokens (default: the model's)")
    group.add_argument("--skip-tokenizer-init", action="store_true", help="do without a tokenizer")
    group.add_argument(
        "--ready-check-timeout-sec",
        type=float,
        default=0,
        metavar="S",
        help="wait so long for a first answer; 0 does not check (default: 0)",
    )


def _add_traffic(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--request-rate",
        type=float,
        nargs="+",
        default=[math.inf],
        metavar="X",
        help="requests per second; inf sends all at once (default: inf). Several make a sweep",
    )
    group.add_argument(
        "--max-concurrency",
        type=int,
        nargs="+",
        default=[None],
        metavar="N",
        help="requests in flight at most (default: no limit). Several make a sweep",
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="X",
        help="shape of the gamma distribution of gaps: 1 is Poisson, less is burstier (default: 1)",
    )
    group.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="let the rate grow")
    group.add_argument("--ramp-up-start-rps", type=float, metavar="X", help="rate at the start")
    group.add_argument("--ramp-up-end-rps", type=float, metavar="X", help="rate at the end")
    group.add_argument(
        "--num-warmups", type=int, default=0, metavar="N", help="requests before each run (default: 0)"
    )
    group.add_argument(
        "--num-client-processes",
        type=int,
        default=1,
        metavar="N",
        help="processes that send, for more load than one makes (default: 1)",
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    for name in SAMPLING:
        kind = int if name == "top_k" else float
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar="X", help="(default: the server's)")
    group.add_argument(
        "--ignore-eos", action="store_true", help="generate every token asked for; random always does"
    )
    group.add_argument("--logprobs", type=int, metavar="N", help="ask for log-probabilities")
    group.add_argument("--extra-body", type=_object, metavar="JSON", help="further fields of every request")
    group.add_argument("--request-id-prefix", metavar="TEXT", help="of X-Request-Id (default: drawn)")


def _add_report(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl,e2el",
        metavar="LIST",
        help="reported: ttft, tpot, itl, e2el, client_queue_time, e2el_including_client_queue "
        "(default: ttft,tpot,itl,e2el)",
    )
    group.add_argument(
        "--metric-percentiles",
        default="50,90,99",
        metavar="LIST",
        help="percentiles of them (default: 50,90,99)",
    )
    group.add_argument(
        "--goodput", nargs="+", metavar="KEY:MS", help="objectives, such as ttft:200 tpot:50 e2el:2000"
    )
    group.add_argument("--save-result", action="store_true", help="write the figures to a JSON file")
    group.add_argument("--append-result", action="store_true", help="add them to that file as a line")
    group.add_argument("--save-detailed", action="store_true", help="with those of each request")
    group.add_argument("--result-dir", type=Path, metavar="DIR", help="(default: here)")
    group.add_argument(
        "--result-filename", metavar="NAME", help="(default: made of label, traffic, model, date)"
    )
    group.add_argument("--label", help="begins the file's name (default: the backend)")
    group.add_argument(
        "--metadata", nargs="*", type=_pair, metavar="KEY=VALUE", help="entries of the result file"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw latency over rate and the Pareto front"
    )
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key.strip(), value.strip()


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value
