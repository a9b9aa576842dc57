"""Starting `tercet serve` and waiting for it."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.tercet import cli_tools
from tests.tercet.cli_tools import DEADLINE_S, ROOT, TERCET, environment


class ServerProcess:
    """A server that has said where it is."""

    def __init__(self, process: subprocess.Popen[str], model: str, url: str) -> None:
        self.process = process
        self.model = model
        self.url = url

    def get(self, path: str) -> tuple[int, Any]:
        return fetch(self.url + path)

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return fetch(self.url + path, body)

    def stop(self, number: int) -> tuple[int, str]:
        """Send a signal and wait: exit code and what was said on stderr."""
        self.process.send_signal(number)
        _, words = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, words


def fetch(url: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of one request on a connection of its own; (0, None) where nothing listens."""
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
    except (urllib.error.URLError, ConnectionError):
        return 0, None


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@contextmanager
def serve(*flags: str, port: bool = True, **env: str) -> Iterator[ServerProcess]:
    """`tercet serve` on any port; killed at the end if it is still there, and nothing of it is left."""
    process = subprocess.Popen(
        [*TERCET, "serve", *(("--port", "0") if port else ()), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**{"TERCET_LOGGING_LEVEL": "WARNING", **env}),
        cwd=ROOT,
    )
    family = []
    try:
        line = _first_line(process)
        match = re.fullmatch(r"serving (.*) at (\S+)", line)
        if match is None:
            process.kill()
            raise AssertionError(f"no server: {line!r} {process.communicate()[1]}")
        yield ServerProcess(process, match[1], match[2])
    finally:
        family = cli_tools.descendants(process.pid)
        if process.poll() is None:
            process.kill()
        process.communicate()
        cli_tools.wait_gone(family)


def _first_line(process: subprocess.Popen[str]) -> str:
    """The first line of stdout, waited for with a bound."""
    assert process.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    stdout = process.stdout
    threading.Thread(target=lambda: lines.put(stdout.readline()), daemon=True).start()
    try:
        return lines.get(timeout=2 * DEADLINE_S).strip()
    except queue.Empty:
        return ""
