"""docs/server.md agrees with the code: parameters, limits and their defaults, routes."""

from __future__ import annotations

import re
from pathlib import Path

from tercet.frontend.server import limits
from tercet.frontend.server.app import make_admin_app, make_app
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.parameters import REFUSED
from tercet.frontend.server.protocol import ChatRequest, CompletionRequest
from tercet.frontend.server.settings import AdmissionLimits, ServerSettings

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "server.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_parameter_is_described() -> None:
    honoured, refused = section("Parameters").split("Refused, unless")
    assert set(re.findall(r"`(\w+)`", refused)) == set(REFUSED)
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    named = set(re.findall(r"`(\w+)`", honoured))
    assert fields - set(REFUSED) - {"model", "messages", "prompt"} <= named


def test_every_limit_has_its_default() -> None:
    text = section("Limits")
    for values in (limits.HttpLimits(), AdmissionLimits()):
        for name in values.__struct_fields__:
            value = getattr(values, name)
            flag = "--max-concurrent-requests" if name == "max_requests" else "--" + name.replace("_", "-")
            if not name.endswith("timeout_s"):
                assert f"| {value or 'none'} | `{flag}` |" in text
    for number in (limits.MAX_PROMPTS, limits.MAX_MESSAGES, limits.MAX_REQUEST_ID_CHARS):
        assert f"| {number} |" in text


def test_every_route_is_described_here_or_with_what_it_shows() -> None:
    context = ServerContext(ServerSettings())
    for app in (make_app(context), make_admin_app(context)):
        for route in app.routes:
            path = getattr(route, "path", "")
            elsewhere = path in ("/", "/metrics", "/load") or path.startswith("/page/")
            assert (
                elsewhere or path.replace("{name:path}", "{name}").replace("_id}", "").split("{")[0] in TEXT
            ), path
