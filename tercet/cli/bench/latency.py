"""`tercet bench latency`: how long an engine takes for one batch, offline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tercet.cli.engine_flags import add_engine_flags, engine_args, given_engine_flags

NAME = "latency"
# Flag -> (default, description).
_NUMBERS = {
    "input-len": (32, "tokens of each prompt"),
    "output-len": (128, "tokens of each answer"),
    "batch-size": (8, "prompts in the batch"),
    "n": (1, "completions of each prompt; the beam width with --use-beam-search"),
    "num-iters-warmup": (10, "batches before the measurement"),
    "num-iters": (30, "batches measured"),
    "seed": (0, "of the prompts"),
}


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet bench latency [--model MODEL] [options]",
        help="measure how long an engine takes for one batch, offline",
        description="Start an engine and run the same batch again and again. Prefix caching is off unless asked for.",
    )
    group = parser.add_argument_group("benchmark")
    group.add_argument("--model", metavar="MODEL", help="(default: the default model)")
    for flag, (default, words) in _NUMBERS.items():
        group.add_argument(
            f"--{flag}", type=int, default=default, metavar="N", help=f"{words} (default: {default})"
        )
    group.add_argument("--use-beam-search", action="store_true", help="search beams instead of sampling")
    group.add_argument("--disable-detokenize", action="store_true", help="leave out turning tokens into text")
    group.add_argument(
        "--profile",
        action="store_true",
        help="trace one batch into TERCET_TORCH_PROFILER_DIR instead of measuring",
    )
    group.add_argument("--output-json", type=Path, metavar="FILE", help="write the figures there")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tercet.bench.offline import LatencyOptions, LatencyRun, check_at_least, latency_result, latency_text
    from tercet.bench.report import save_json
    from tercet.cli.session import configure_quietly
    from tercet.frontend.llm import LLM

    check_at_least(1, num_iters=args.num_iters)
    check_at_least(0, num_iters_warmup=args.num_iters_warmup)
    names = [name for name in LatencyOptions.__struct_fields__ if name != "detokenize"]
    options = LatencyOptions(
        detokenize=not args.disable_detokenize, **{name: getattr(args, name) for name in names}
    )
    configure_quietly()
    engine = engine_args(args.model, args)
    engine.disable_log_stats = True  # the figures are the command's own
    if "enable_prefix_caching" not in given_engine_flags(args):
        engine.enable_prefix_caching = False  # or every batch but the first would skip its prefill
    with LLM.from_engine_args(engine) as llm:
        batch = LatencyRun(llm, options)
        for _ in _bar(args.num_iters_warmup, "Warmup iterations", args):
            batch.once()
        if args.profile:
            llm.start_profile()
            batch.once()
            llm.stop_profile()
            return 0
        latencies_s = [batch.once() for _ in _bar(args.num_iters, "Bench iterations", args)]
    result = latency_result(latencies_s)
    print(latency_text(result))
    if args.output_json is not None:
        save_json(args.output_json, result, indent=4)
    return 0


def _bar(count: int, description: str, args: argparse.Namespace) -> Any:
    from tqdm import tqdm

    return tqdm(range(count), desc=description, disable=args.disable_tqdm, dynamic_ncols=True)
