"""/tokenize and /detokenize: text to tokens and back, without the engine."""

from __future__ import annotations

from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tercet.frontend.server.chat import check_template, render
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.errors import bad_request
from tercet.frontend.server.generation import in_render_pool
from tercet.frontend.server.parameters import decode
from tercet.frontend.server.protocol import DetokenizeRequest, TokenizeRequest
from tercet.frontend.server.reply import json_response
from tercet.frontend.server.responses import DetokenizeResponse, TokenizeResponse
from tercet.frontend.validation import check_token_ids

_TOKENIZE: Final = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE: Final = msgspec.json.Decoder(DetokenizeRequest)


def routes(context: ServerContext) -> list[BaseRoute]:
    async def tokenize(http: Request) -> Response:
        request: TokenizeRequest = decode(_TOKENIZE, await http.body())
        context.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise bad_request("prompt", "prompt: give either prompt or messages")
        check_template(context, request)
        return json_response(await in_render_pool(context, _tokenize, context, request))

    async def detokenize(http: Request) -> Response:
        request: DetokenizeRequest = decode(_DETOKENIZE, await http.body())
        context.check_model(request.model)
        check_token_ids("tokens", request.tokens, context.engine.model_info.vocab_size)
        text = await in_render_pool(context, context.tokenizer.decode, request.tokens)
        return json_response(DetokenizeResponse(text))

    return [
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def _tokenize(context: ServerContext, request: TokenizeRequest) -> TokenizeResponse:
    tokenizer = context.tokenizer
    if request.prompt is not None:
        text, special = request.prompt, request.add_special_tokens is not False
    else:
        text, special = render(context, request), bool(request.add_special_tokens)
    ids = tokenizer.encode(text, add_special_tokens=special)
    names = None
    if request.return_token_strs:
        names = [name or "" for name in tokenizer.convert_ids_to_tokens(ids)]
    return TokenizeResponse(len(ids), context.engine.model_info.max_model_len, ids, names)
