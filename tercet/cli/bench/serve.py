"""`tercet bench serve`: measure any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.cli.bench.dataset_flags import dataset_config
from tercet.cli.bench.serve_flags import SAMPLING, add_serve_flags
from tercet.errors import ConfigError, TercetError

if TYPE_CHECKING:
    from tercet.bench.arrivals import RampUp
    from tercet.bench.datasets import BenchPrompt, DatasetConfig
    from tercet.bench.metrics import Selection
    from tercet.bench.serve import RunOptions, Target, Traffic
    from tercet.frontend.tokenizer import Tokenizer

NAME = "serve"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet bench serve [--base-url URL] [options]",
        help="measure an OpenAI-compatible server",
        description="Send requests to an OpenAI-compatible server and report latencies and throughput.",
    )
    add_serve_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import uvloop

    return uvloop.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    from tercet.bench.plot import check_matplotlib, plot_sweep
    from tercet.bench.report import sweep_table

    selection, sweep, config = _selection(args), _sweep(args), dataset_config(args)
    if args.num_client_processes < 1:
        raise ConfigError("num_client_processes", f"must be at least 1; got {args.num_client_processes}")
    if args.plot is not None:
        check_matplotlib()
        _check_plotted(selection)
    target, model_id = await _target(args, config)
    tokenizer_id, tokenizer = _tokenizer(args, model_id, config)
    prompts = _prompts(config, tokenizer, target)
    await _check_ready(args, target, prompts)
    results = []
    for traffic in sweep:
        result = {
            **_described(args, model_id, tokenizer_id, len(prompts), traffic),
            **await _measure(args, target, prompts, traffic, selection, tokenizer),
        }
        _report(args, result, selection, is_one_of_several=len(sweep) > 1)
        results.append(result)
    if len(sweep) > 1:
        print(sweep_table(results))
    if args.plot is not None:
        plot_sweep(results, args.plot)
        print(f"figure: {args.plot}")
    return 0 if all(result["completed"] for result in results) else 1


def _selection(args: argparse.Namespace) -> Selection:
    from tercet.bench.metrics import Selection

    try:
        percentiles = tuple(float(one) for one in args.metric_percentiles.split(","))
    except ValueError:
        raise ConfigError("metric_percentiles", f"must be numbers; got {args.metric_percentiles!r}") from None
    goodput: dict[str, float] = {}
    for pair in args.goodput or ():
        name, _, limit = pair.partition(":")
        try:
            goodput[name] = float(limit)
        except ValueError:
            raise ConfigError("goodput", f"must be pairs such as ttft:200, in ms; got {pair!r}") from None
    metrics = tuple(name.strip() for name in args.percentile_metrics.split(","))
    return Selection(metrics, percentiles, goodput)


def _check_plotted(selection: Selection) -> None:
    if missing := {"ttft", "tpot", "e2el"} - set(selection.metrics):
        raise ConfigError("percentile_metrics", f"--plot needs {', '.join(sorted(missing))} among them")


def _sweep(args: argparse.Namespace) -> list[Traffic]:
    from tercet.bench.serve import Traffic

    ramp_up = _ramp_up(args)
    return [
        Traffic(
            request_rate=rate,
            burstiness=args.burstiness,
            max_concurrency=concurrency,
            ramp_up=ramp_up,
            seed=args.seed,
        )
        for rate, concurrency in itertools.product(args.request_rate, args.max_concurrency)
    ]


def _ramp_up(args: argparse.Namespace) -> RampUp | None:
    from tercet.bench.arrivals import RampUp

    start, end = args.ramp_up_start_rps, args.ramp_up_end_rps
    if args.ramp_up_strategy is None:
        if start is not None or end is not None:
            raise ConfigError("ramp_up_strategy", "choose linear or exponential for a ramp-up")
        return None
    if start is None or end is None:
        raise ConfigError("ramp_up_start_rps", "a ramp-up needs --ramp-up-start-rps and --ramp-up-end-rps")
    return RampUp(args.ramp_up_strategy, start, end)


async def _target(args: argparse.Namespace, config: DatasetConfig) -> tuple[Target, str]:
    """The server's endpoint, and which model it is (a path or hub id, for its tokenizer)."""
    from tercet.bench.http_client import Server
    from tercet.bench.serve import ENDPOINTS, Target, default_headers, first_model

    host = f"[{args.host}]" if ":" in args.host else args.host
    headers = {**default_headers(), **dict(args.header or ())}
    url = args.base_url or f"http://{host}:{args.port}"
    server, prefix = Server.from_url(url, headers, verify=not args.insecure)
    endpoint = args.endpoint or ENDPOINTS[args.backend]
    if ("chat" in endpoint) != (args.backend == "openai-chat"):
        raise ConfigError("endpoint", f"{endpoint} does not go with --backend {args.backend}")
    if args.backend == "openai-chat" and config.random_vocab_size is not None:
        raise ConfigError("random_vocab_size", "token ids can be sent to a completions endpoint only")
    if args.model is not None:
        name, model_id = args.served_model_name or args.model, args.model
    else:
        name, model_id = await first_model(server, prefix)
        name = args.served_model_name or name
    sampling = {field: getattr(args, field) for field in SAMPLING if getattr(args, field) is not None}
    target = Target(
        server=server,
        backend=args.backend,
        path=prefix + endpoint,
        model=name,
        ignore_eos=args.ignore_eos
        or args.dataset_name == "random",  # random prompts may end at once otherwise
        logprobs=args.logprobs,
        extra_body={**sampling, **(args.extra_body or {})},
    )
    return target, model_id


def _tokenizer(
    args: argparse.Namespace, model_id: str, config: DatasetConfig
) -> tuple[str | None, Tokenizer | None]:
    """The tokenizer and where it is from; none if it is unwanted, or not needed and not named."""
    if args.skip_tokenizer_init or (config.random_vocab_size is not None and args.tokenizer is None):
        return None, None
    from tercet.frontend.tokenizer import Tokenizer, load_bundle
    from tercet.model_source import DEFAULT_MODEL_NAME, resolve_model

    source = args.tokenizer or model_id
    path = Path(source).expanduser()
    try:
        if not path.exists():  # a tokenizer's folder need not be a model's
            path = resolve_model(None if source == DEFAULT_MODEL_NAME else source).path
        return source, Tokenizer(load_bundle(path))
    except TercetError as error:
        raise ConfigError(
            "tokenizer",
            f"{error}. Name a folder or .gguf file with --tokenizer, or do without: --random-vocab-size N, "
            "or --dataset-name custom --skip-tokenizer-init",
        ) from None


def _prompts(config: DatasetConfig, tokenizer: Tokenizer | None, target: Target) -> list[BenchPrompt]:
    from tercet.bench.datasets import make_prompts

    return make_prompts(config, tokenizer, for_chat=target.is_chat)


async def _check_ready(args: argparse.Namespace, target: Target, prompts: list[BenchPrompt]) -> None:
    from tercet.bench.serve import wait_until_ready

    if args.ready_check_timeout_sec > 0:
        await wait_until_ready(target, prompts[0], args.ready_check_timeout_sec)


async def _measure(
    args: argparse.Namespace,
    target: Target,
    prompts: list[BenchPrompt],
    traffic: Traffic,
    selection: Selection,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    from tqdm import tqdm

    from tercet.bench.serve import benchmark

    with tqdm(total=len(prompts), disable=args.disable_tqdm or None, dynamic_ncols=True) as bar:
        return await benchmark(target, prompts, traffic, selection, _options(args), tokenizer, bar.update)


def _options(args: argparse.Namespace) -> RunOptions:
    from tercet.bench.serve import RunOptions

    return RunOptions(
        num_client_processes=args.num_client_processes,
        num_warmups=args.num_warmups,
        keep_text=args.save_detailed,
        request_id_prefix=args.request_id_prefix or f"bench-{uuid.uuid4().hex[:8]}-",
    )


def _described(
    args: argparse.Namespace, model_id: str, tokenizer_id: str | None, num_prompts: int, traffic: Traffic
) -> dict[str, Any]:
    """What was measured, under vLLM's keys."""
    from tercet.bench.report import timestamp

    described: dict[str, Any] = {
        "date": timestamp(),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model_id,
        "tokenizer_id": tokenizer_id,
        "num_prompts": num_prompts,
        **dict(args.metadata or ()),
        "request_rate": traffic.request_rate if math.isfinite(traffic.request_rate) else "inf",
        "burstiness": traffic.burstiness,
        "max_concurrency": traffic.max_concurrency,
    }
    if (ramp_up := traffic.ramp_up) is not None:
        described["ramp_up_strategy"] = ramp_up.strategy
        described["ramp_up_start_rps"] = ramp_up.start_rps
        described["ramp_up_end_rps"] = ramp_up.end_rps
    return described


def _report(
    args: argparse.Namespace, result: dict[str, Any], selection: Selection, *, is_one_of_several: bool
) -> None:
    from tercet.bench.metrics import DETAILS, table
    from tercet.bench.report import result_path, save_json
    from tercet.bench.serve import first_errors

    for error in first_errors(result):
        print(f"failed: {error}", file=sys.stderr)
    print(table(result, selection), flush=True)
    if not (args.save_result or args.append_result):
        return
    left_out = () if args.save_detailed else DETAILS
    path = result_path(
        result,
        directory=args.result_dir,
        filename=args.result_filename,
        is_one_of_several=is_one_of_several and not args.append_result,
    )
    saved = {key: value for key, value in result.items() if key not in left_out}
    save_json(path, saved, append=args.append_result)
    print(f"result: {path}")
