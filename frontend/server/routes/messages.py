"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from tercet.frontend.server.call import GenerationEndpoint
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.messages_api import count_tokens, create_message, error_json


def routes(context: ServerContext) -> list[BaseRoute]:
    create = GenerationEndpoint(context, create_message, is_chat=True, error_json=error_json)
    count = GenerationEndpoint(context, count_tokens, is_chat=True, error_json=error_json)
    return [
        Route("/v1/messages", create, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]
