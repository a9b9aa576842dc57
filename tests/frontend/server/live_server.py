"""The server on a loopback port, in a thread of the test's process, attached to a scripted core."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import uvloop

from tercet.frontend.async_llm import AsyncLLM
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.serving import ApiServer, bind
from tercet.frontend.server.settings import ListenSettings, ServerSettings
from tercet.ipc.messages import AddRequest, Finish, Logprobs, PromptLogprobs
from tests.frontend.fake_core import VOCAB_SIZE, FakeCore, step_outputs
from tests.frontend.text_engine import make_bundle

Answer = Callable[[AddRequest], list[msgspec.Struct]]


def _columns(handles: list[int], token: int, count: int) -> Logprobs:
    """The chosen token at -0.5, then `count` others from token 10 on."""
    others = [10 + i for i in range(count)]
    return Logprobs(
        key=np.array(handles, np.uint64),
        token_ids=np.array([[token, *others]] * len(handles), np.int32),
        logprobs=np.array([[-0.5, *(-1.0 - i for i in range(count))]] * len(handles), np.float32),
        rank=np.array([count + 1] * len(handles), np.int32),
    )


def echo(message: AddRequest) -> list[msgspec.Struct]:
    """Answers each child with the prompt's tokens, one a step, and made-up log-probabilities where asked."""
    sampling = message.sampling
    prompt = message.token_ids.tolist()
    tokens = prompt[: sampling.max_tokens]
    handles = list(range(message.handle, message.handle + len(message.seeds)))
    steps: list[msgspec.Struct] = []
    for i, token in enumerate(tokens):
        last = i == len(tokens) - 1
        fields: dict[str, Any] = {}
        if sampling.logprobs is not None:
            fields["logprobs"] = _columns(handles, token, sampling.logprobs)
        if sampling.prompt_logprobs is not None and i == 0 and len(prompt) > 1:
            fields["prompt_logprobs"] = _prompt_columns(handles, prompt, sampling.prompt_logprobs)
        steps.append(
            step_outputs(
                {handle: [token] for handle in handles},
                first=i,
                finish=dict.fromkeys(handles, Finish.LENGTH) if last else None,
                **fields,
            )
        )
    return steps


def _prompt_columns(handles: list[int], prompt: list[int], count: int) -> PromptLogprobs:
    scored = prompt[1:]
    others = [10 + i for i in range(count)]
    return PromptLogprobs(
        key=np.array(handles[:1], np.uint64),
        start=np.array([1], np.int32),
        offset=np.array([0, len(scored)], np.int32),
        token_ids=np.array([[token, *others] for token in scored], np.int32),
        logprobs=np.array([[-0.25, *(-1.0 - i for i in range(count))] for _ in scored], np.float32),
        rank=np.array([count + 1] * len(scored), np.int32),
    )


def silent(_: AddRequest) -> list[msgspec.Struct]:
    """Answers nothing: the request waits."""
    return []


class LiveServer:
    """A server that runs; see `live_server`."""

    def __init__(self, core: FakeCore, context: ServerContext, port: int) -> None:
        self.core = core
        self.context = context
        self.port = port
        self.api: ApiServer | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request on a connection of its own: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, dict(headers or {}))
            response = connection.getresponse()
            names = {name.lower(): value for name, value in response.getheaders()}
            return response.status, names, response.read()
        finally:
            connection.close()

    def post(self, path: str, headers: Mapping[str, str] | None = None, **body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        status, _, data = self.request("POST", path, body, headers)
        return status, json.loads(data)

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        status, _, data = self.request("GET", path, None, headers)
        return status, json.loads(data)

    def stream(self, path: str, **body: Any) -> list[Any]:
        """Data of each event of a stream, JSON but for the last, which is [DONE]."""
        status, headers, data = self.request("POST", path, {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        return events_of(data)

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function on the server's event loop."""
        assert self.loop is not None

        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)


def events_of(data: bytes) -> list[Any]:
    """The events of a body, framed exactly as they should be."""
    assert data.endswith(b"\n\n")
    found: list[Any] = []
    for block in data.decode()[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        text = block.removeprefix("data: ")
        found.append(text if text == "[DONE]" else json.loads(text))
    return found


@contextmanager
def live_server(
    answer: Answer = echo,
    settings: ServerSettings | None = None,
    listen: ListenSettings | None = None,
    **fake: Any,
) -> Iterator[LiveServer]:
    """A server and its scripted core; both are gone afterwards."""
    listen = msgspec.structs.replace(listen or ListenSettings(), port=0)
    context = ServerContext(settings or ServerSettings())
    sock = bind(listen)
    welcome = {"heartbeat_s": 300.0, **fake.pop("welcome", {})}  # a scripted core has no heartbeat of its own
    with FakeCore(make_bundle(), answer=answer, welcome=welcome, **fake) as core:
        server = LiveServer(core, context, sock.getsockname()[1])
        ready = threading.Event()
        errors: list[BaseException] = []

        async def serve() -> None:
            server.loop = asyncio.get_running_loop()
            server.api = ApiServer(context, listen, sock)
            await context.attach(await AsyncLLM.connect(core.address))
            running = asyncio.create_task(server.api.run())
            ready.set()
            await running
            await context.close()

        def run() -> None:
            try:
                uvloop.run(serve())
            except BaseException as error:
                errors.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="live-server")
        thread.start()
        assert ready.wait(30)
        try:
            yield server
        finally:
            if server.loop is not None and server.api is not None and thread.is_alive():
                server.loop.call_soon_threadsafe(server.api.stop)
            thread.join(30)
            sock.close()
        assert not thread.is_alive()
        assert errors == []


__all__ = ["VOCAB_SIZE", "LiveServer", "echo", "events_of", "live_server", "silent"]
