"""/v1/responses."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.call import GenerationEndpoint
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.reply import json_response
from tercet.frontend.server.response_shapes import DeletedResponse
from tercet.frontend.server.responses_api import cancel_response, create_response, stored_response


def routes(context: ServerContext) -> list[BaseRoute]:
    async def retrieve(request: Request) -> Response:
        return json_response(stored_response(context, request.path_params["response_id"]).response)

    async def delete(request: Request) -> Response:
        response_id = request.path_params["response_id"]
        stored_response(context, response_id)
        deleted = context.responses is not None and context.responses.delete(response_id)
        body: DeletedResponse = {"id": response_id, "object": "response", "deleted": deleted}
        return json_response(body)

    async def cancel(request: Request) -> Response:
        return json_response(await cancel_response(context, request.path_params["response_id"]))

    create = GenerationEndpoint(context, create_response, is_chat=True)
    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/{response_id}", retrieve, methods=["GET"]),
        Route("/v1/responses/{response_id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/cancel", cancel, methods=["POST"]),
    ]
