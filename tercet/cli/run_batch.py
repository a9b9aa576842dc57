"""`tercet run-batch`: answer the requests of an OpenAI batch file, offline."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tercet.cli.engine_flags import add_session_flags, engine_args, given_engine_flags
from tercet.errors import ConfigError

if TYPE_CHECKING:
    from tercet.cli.batch_file import AsgiApp
    from tercet.frontend.async_llm import AsyncLLM

NAME = "run-batch"


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        NAME,
        usage="tercet run-batch -i FILE -o FILE [--model MODEL | --connect ADDRESS] [options]",
        help="answer the requests of a batch file",
        description="Answer each line of an OpenAI batch file (chat completions and completions) with a line of "
        "the output file, in the same order. A line that fails gets an error, and the others go on.",
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, JSON lines"
    )
    files.add_argument(
        "-o", "--output-file", type=Path, required=True, metavar="FILE", help="answers, JSON lines"
    )
    files.add_argument("--disable-tqdm", action="store_true", help="show no progress bar")
    add_session_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import uvloop

    from tercet.cli.session import configure_quietly

    source, sink = _open_files(args.input_file, args.output_file)
    with source, sink:
        configure_quietly()
        words = uvloop.run(_run(args, source, sink))
    print(f"[{words}]", file=sys.stderr)
    return 0


def _open_files(source: Path, sink: Path) -> tuple[BinaryIO, BinaryIO]:
    """Both, before an engine is started for nothing."""
    try:
        reader = source.open("rb")
    except OSError as error:
        raise ConfigError("input_file", f"cannot read {source}: {error.strerror}") from None
    try:
        if sink.exists() and sink.samefile(source):
            raise ConfigError("output_file", f"{sink} is the input file; name another")
        return reader, sink.open("wb")
    except OSError as error:
        reader.close()
        raise ConfigError("output_file", f"cannot write {sink}: {error.strerror}") from None
    except ConfigError:
        reader.close()
        raise


async def _run(args: argparse.Namespace, source: BinaryIO, sink: BinaryIO) -> str:
    """Answer the file; returns the figures of it, the engine's start not counted."""
    from tqdm import tqdm

    from tercet.cli.batch_file import Totals, answer_lines

    num_lines = sum(1 for line in source if line.strip())
    source.seek(0)
    totals = Totals()
    async with await _engine(args) as engine:
        app = await _application(engine)
        started_s = time.monotonic()
        with tqdm(total=num_lines, disable=args.disable_tqdm or None, dynamic_ncols=True) as bar:
            async with aclosing(answer_lines(app, source)) as results:
                async for result in results:
                    write_line(sink, result)
                    totals.add(result)
                    bar.update(1)
        return totals.text(max(time.monotonic() - started_s, 1e-9))


def write_line(sink: BinaryIO, result: object) -> None:
    """One JSON line, at once: an interrupted run has what it did."""
    import msgspec

    sink.write(msgspec.json.encode(result) + b"\n")
    sink.flush()


async def _engine(args: argparse.Namespace) -> AsyncLLM:
    from tercet.frontend.async_llm import AsyncLLM

    if args.connect is None:
        engine = engine_args(args.model, args)
        engine.disable_log_stats = True  # the figures are the command's own
        return await asyncio.to_thread(AsyncLLM.from_engine_args, engine)
    refused = ["--model"] if args.model is not None else []
    refused += ["--" + name.replace("_", "-") for name in given_engine_flags(args)]
    if refused:
        raise ConfigError("connect", f"the engine there is as it was started: leave out {', '.join(refused)}")
    return await AsyncLLM.connect(args.connect)


async def _application(engine: AsyncLLM) -> AsgiApp:
    """The server's application, without a server."""
    try:
        from tercet.frontend.server.app import create_app
    except ModuleNotFoundError as error:
        raise ConfigError("run-batch", f"needs {error.name}: pip install 'tercet[server]'") from None
    from tercet.frontend.server.settings import ServerSettings

    app = create_app(engine, ServerSettings())
    await app.state.context.attach(engine)
    return app
