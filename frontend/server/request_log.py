"""The record of a request's arrival: who asks for what, never the prompt."""

from __future__ import annotations

from tercet.frontend.server.call import Call
from tercet.log import get_logger

logger = get_logger(__name__)


def log_request(call: Call, name: str, model: str, user: str | None) -> None:
    """Log one request, where the server is to do so."""
    if call.context.settings.log_requests:
        who = f" user={user[:200]!r}" if user is not None else ""
        logger.info("received %s model=%r bytes=%d%s", name, model, len(call.body), who)
