"""/v1/chat/completions, /v1/completions and /v1/models."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.call import GenerationEndpoint
from tercet.frontend.server.chat import chat_completions
from tercet.frontend.server.completions import completions
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.reply import json_response
from tercet.frontend.server.responses import Model, ModelList


def routes(context: ServerContext) -> list[BaseRoute]:
    async def list_models(_: Request) -> Response:
        return json_response(ModelList([_model(context, name) for name in context.model_names]))

    async def show_model(request: Request) -> Response:
        return json_response(_model(context, context.check_model(request.path_params["name"])))

    chat = GenerationEndpoint(context, chat_completions, is_chat=True)
    complete = GenerationEndpoint(context, completions)
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", show_model),
    ]


def _model(context: ServerContext, name: str) -> Model:
    info = context.engine.model_info
    return Model(name, context.created_s, root=context.model_names[0], max_model_len=info.max_model_len)
