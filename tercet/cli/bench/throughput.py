"""`tercet bench throughput`: how much an engine generates, offline."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tercet.cli.bench.dataset_flags import add_dataset_flags, dataset_config
from tercet.cli.engine_flags import add_engine_flags, engine_args

if TYPE_CHECKING:
    from tercet.bench.datasets import DatasetConfig
    from tercet.bench.offline import ThroughputOptions
    from tercet.config import EngineArgs

NAME = "throughput"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet bench throughput [--model MODEL] [options]",
        help="measure how much an engine generates, offline",
        description="Start an engine, give it all prompts at once, and report requests and tokens per second.",
    )
    group = parser.add_argument_group("benchmark")
    group.add_argument("--model", metavar="MODEL", help="(default: the default model)")
    group.add_argument("--async-engine", action="store_true", help="stream through AsyncLLM instead of LLM")
    group.add_argument(
        "--n", type=int, default=1, metavar="N", help="completions of each prompt (default: 1)"
    )
    group.add_argument("--disable-detokenize", action="store_true", help="leave out turning tokens into text")
    group.add_argument("--output-json", type=Path, metavar="FILE", help="write the figures there")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")
    add_dataset_flags(parser)
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import uvloop

    from tercet.bench.offline import ThroughputOptions, check_at_least, throughput_result, throughput_text
    from tercet.bench.report import save_json
    from tercet.cli.session import configure_quietly

    check_at_least(1, n=args.n)
    config = dataset_config(args)
    options = ThroughputOptions(n=args.n, detokenize=not args.disable_detokenize)
    configure_quietly()
    engine = engine_args(args.model, args)
    engine.disable_log_stats = True  # the figures are the command's own
    show_progress = not args.disable_tqdm
    if args.async_engine:
        num_requests, figures = uvloop.run(_asynchronous(engine, config, options, show_progress))
    else:
        num_requests, figures = _synchronous(engine, config, options, show_progress)
    result = throughput_result(num_requests, *figures)
    print(throughput_text(result))
    if args.output_json is not None:
        save_json(args.output_json, result, indent=4)
    return 0


def _synchronous(
    engine: EngineArgs, config: DatasetConfig, options: ThroughputOptions, show_progress: bool
) -> tuple[int, tuple[float, int, int]]:
    from tercet.bench.offline import engine_prompts, run_sync
    from tercet.errors import EngineError
    from tercet.frontend.llm import LLM

    with LLM.from_engine_args(engine) as llm:
        try:
            tokenizer = llm.get_tokenizer()
        except EngineError:  # it takes and gives token ids
            tokenizer = None
        prompts = engine_prompts(config, tokenizer, llm.model_info)
        return len(prompts), run_sync(llm, prompts, options, show_progress=show_progress)


async def _asynchronous(
    engine_args: EngineArgs, config: DatasetConfig, options: ThroughputOptions, show_progress: bool
) -> tuple[int, tuple[float, int, int]]:
    from tqdm import tqdm

    from tercet.bench.offline import engine_prompts, run_async
    from tercet.frontend.async_llm import AsyncLLM

    async with await asyncio.to_thread(AsyncLLM.from_engine_args, engine_args) as engine:
        tokenizer = await engine.get_tokenizer() if engine.has_tokenizer else None
        prompts = engine_prompts(config, tokenizer, engine.model_info)
        with tqdm(total=len(prompts), disable=not show_progress, dynamic_ncols=True) as bar:
            return len(prompts), await run_async(engine, prompts, options, bar.update)
