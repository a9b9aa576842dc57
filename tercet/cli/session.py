"""An engine as a command uses it: started or attached to, driven from the main thread, left in order.

The engine's event loop runs in a thread, so that the connection is served while the main thread waits for
someone to type, and Ctrl-C reaches the main thread at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import threading
from collections.abc import Coroutine, Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from tercet import log
from tercet.cli.engine_flags import engine_args, given_engine_flags
from tercet.cli.sampling_flags import sampling_params
from tercet.cli.terminal import figures
from tercet.errors import ConfigError
from tercet.frontend.async_llm import AsyncLLM
from tercet.frontend.inputs import PromptType
from tercet.frontend.launcher import EngineProcesses
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.sampling_params import SamplingParams
from tercet.frontend.status_line import StatusLine
from tercet.frontend.stream import RequestStream
from tercet.frontend.tokenizer import Tokenizer
from tercet.ipc.address import check_address

QUIET_LEVEL = "WARNING"
"""Level of commands whose output is an answer, unless TERCET_LOGGING_LEVEL says another."""

T = TypeVar("T")


class Session:
    """An engine that is ready, for one thread."""

    def __init__(self, engine: AsyncLLM, loop: LoopThread, params: SamplingParams) -> None:
        self.engine = engine
        self.params = params
        self._loop = loop

    @property
    def model_name(self) -> str:
        return self.engine.model_info.served_names[0]

    def tokenizer(self) -> Tokenizer:
        """Raises EngineError where the engine has none."""
        return self._loop.run(self.engine.get_tokenizer())

    def stream(
        self, prompt: PromptType, *, add_special_tokens: bool = True
    ) -> Generator[RequestOutput, None, None]:
        """Outputs as they come. Leaving the iteration early, by Ctrl-C too, aborts the request."""
        stream: RequestStream = self._loop.run(
            self.engine.add_request(prompt, self.params, add_special_tokens=add_special_tokens)
        )
        try:
            while not stream.finished:
                yield self._loop.run(stream.get())
        finally:
            self._loop.run(_close(stream))


async def _close(stream: RequestStream) -> None:
    stream.close()


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tercet-cli", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@contextmanager
def open_session(args: argparse.Namespace) -> Iterator[Session]:
    """Start the engine that the arguments describe, or attach to it; leave it at the end.

    Raises:
        ConfigError, ValidationError: an argument cannot work. Looked at before anything is started.
        TercetError: the engine cannot start, or is not there.
    """
    level = configure_quietly()
    sampling_params(args, {})
    loop = LoopThread()
    try:
        with StatusLine() as status:
            engine = _connect(args) if args.connect is not None else _start(args, status, level)
        try:
            loop.run(engine.start())
            yield Session(engine, loop, sampling_params(args, engine.model_info.default_sampling))
        finally:
            engine.shutdown()
    finally:
        loop.stop()


def configure_quietly() -> str:
    """Log to stderr, from WARNING on unless the environment says otherwise; returns the level."""
    log.configure("cli")
    level = os.environ.get("TERCET_LOGGING_LEVEL") or QUIET_LEVEL
    logging.getLogger("tercet").setLevel(level.strip().upper())
    return level


def _connect(args: argparse.Namespace) -> AsyncLLM:
    refused = ["--model"] if args.model is not None else []
    refused += ["--" + name.replace("_", "-") for name in given_engine_flags(args)]
    if refused:
        raise ConfigError("connect", f"the engine there is as it was started: leave out {', '.join(refused)}")
    try:
        return AsyncLLM(check_address(args.connect))
    except ConfigError as error:
        raise ConfigError("connect", error.problem) from None


def _start(args: argparse.Namespace, status: StatusLine, level: str) -> AsyncLLM:
    config = engine_args(args.model, args).create_engine_config()
    processes = EngineProcesses(config, progress=status.show, log_level=level)
    try:
        status.show("starting the engine")
        processes.start()
    except BaseException:
        processes.stop()
        raise
    return AsyncLLM(processes.address, processes=processes)


def print_stream(outputs: Generator[RequestOutput, None, None], texts: list[str]) -> RequestOutput | None:
    """Print an answer as it comes, adding its pieces to `texts`; returns its last output."""
    last = None
    with closing(outputs):  # now, whatever happens: later the session may be over
        for last in outputs:
            for completion in last.outputs:
                texts.append(completion.text)
                print(completion.text, end="", flush=True)
    return last


def print_figures(output: RequestOutput | None) -> None:
    """Length, TTFT and rate of a finished answer, on stderr."""
    if output is not None and output.metrics is not None:
        words = figures(output.metrics, len(output.prompt_token_ids), output.num_cached_tokens)
        print(f"[{words}]", file=sys.stderr)


def read_stdin() -> str:
    """All of stdin as a prompt.

    Raises:
        ConfigError: it is not UTF-8, or empty.
    """
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError("stdin", f"is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ConfigError("prompt", "is empty: give it as an argument or on stdin")
    return text.rstrip("\n")
