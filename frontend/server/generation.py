"""The one call behind every endpoint that generates: prompts and parameters in, outputs of the engine out.

Opens a stream for each prompt, gives what is new of all of them as one step, and closes them however the
request ends. Knows nothing of HTTP or of any response format.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from tercet.frontend.async_llm import AsyncLLM, NewRequest
from tercet.frontend.inputs import PromptType
from tercet.frontend.outputs import RequestOutput
from tercet.frontend.sampling_params import SamplingParams
from tercet.frontend.server.admission import Ticket
from tercet.frontend.server.context import ServerContext
from tercet.frontend.stream import RequestStream, wait_for_any

T = TypeVar("T")


class Generation:
    """Requests of the engine that answer one request of a client. Leaving it aborts what is unfinished."""

    def __init__(self, streams: Sequence[RequestStream], ticket: Ticket | None) -> None:
        self._streams = streams
        self._ticket = ticket

    @classmethod
    async def open(
        cls,
        engine: AsyncLLM,
        prompts: Sequence[PromptType],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        add_special_tokens: bool,
        ticket: Ticket | None = None,
        trace_headers: Mapping[str, str] | None = None,
    ) -> Self:
        """Send a request for each prompt; all of them or none.

        Args:
            request_id: unique among unfinished requests; the prompts' numbers are appended.
            trace_headers: of the client; a `traceparent` among them is the parent of what is traced.
            ticket: told when the prompts are tokenized and when the first output comes.

        Raises:
            TercetError: see `AsyncLLM.add_requests`.
        """
        requests = [
            NewRequest(prompt, params, f"{request_id}-{index}", priority, trace_headers=trace_headers)
            for index, prompt in enumerate(prompts)
        ]
        streams = await engine.add_requests(requests, add_special_tokens=add_special_tokens)
        if ticket is not None:
            ticket.tokenized(sum(stream.num_prompt_tokens for stream in streams))
        return cls(streams, ticket)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(stream.num_prompt_tokens for stream in self._streams)

    async def results(self) -> list[RequestOutput]:
        """The last output of each prompt; for FINAL_ONLY."""
        return [await stream.get() for stream in self._streams]

    async def steps(self) -> AsyncGenerator[list[tuple[int, RequestOutput]], None]:
        """What is new, as (prompt's number, output): everything that has come since the last step at once."""
        streams = self._streams
        if len(streams) == 1:  # the common case, without a search for who has something
            async for output in streams[0]:
                self._started()
                yield [(0, output)]
            return
        unfinished = list(enumerate(streams))
        while unfinished:
            await wait_for_any([stream for _, stream in unfinished])
            found = [(index, stream.get_nowait()) for index, stream in unfinished]
            unfinished = [(index, stream) for index, stream in unfinished if not stream.finished]
            step = [(index, output) for index, output in found if output is not None]
            if step:
                self._started()
                yield step

    def _started(self) -> None:
        if self._ticket is not None:
            self._ticket.started()
            self._ticket = None

    def close(self) -> None:
        """Abort what is unfinished. Idempotent."""
        for stream in self._streams:
            stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


async def in_render_pool(context: ServerContext, function: Callable[..., T], *args: Any) -> T:
    """Run what takes long, such as a chat template, beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(context.render_pool, function, *args)
