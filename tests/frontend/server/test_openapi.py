"""The server keeps to its own OpenAPI document: schemathesis asks every operation what it may and may not be asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode, Response
from schemathesis.specs.openapi import checks
from starlette.routing import Route

from tercet.frontend.server.app import make_app
from tercet.frontend.server.auth import OPEN_PATHS
from tercet.frontend.server.context import ServerContext
from tercet.frontend.server.openapi import make_document
from tercet.frontend.server.parameters import REFUSED
from tercet.frontend.server.settings import ServerSettings
from tests.conftest import FULL
from tests.e2e.server_tools import serve
from tests.tercet.cli_tools import VOCAB_SIZE, write_tokenizer

KEY = "a-key"
NUM_EXAMPLES = 300 if FULL else 10  # of each operation, once right and once wrong
SETTINGS = ServerSettings(api_keys=(KEY,), enable_responses_store=True, trust_request_chat_template=True)
DOCUMENT = make_document(SETTINGS)
OPERATIONS = {
    (path, method): one for path, methods in DOCUMENT["paths"].items() for method, one in methods.items()
}
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(*name, RIGHT) for name in OPERATIONS]
CASES += [(*name, WRONG) for name, one in OPERATIONS.items() if one.keys() & {"requestBody", "parameters"}]
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
# Not `positive_data_acceptance`: a document cannot say that a token is of the vocabulary or that two
# parameters exclude each other, so a request that it allows may yet be refused with a 400.


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model, which has log-probabilities as any, behind a server of `SETTINGS`."""
    from transformers import LlamaConfig

    from tests.worker_proc.models_harness import save_tiny_checkpoint

    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": 0}
    save_tiny_checkpoint(LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, **heads), folder)
    flags = ("--max-model-len", "64", "--kv-cache-memory-bytes", "16M", "--device", "cpu")
    own = ("--api-key", KEY, "--enable-responses-store", "--trust-request-chat-template")
    with serve(str(folder), *flags, *own, OMP_NUM_THREADS="1") as server:
        yield server.url


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as found:
        found.headers["authorization"] = f"Bearer {KEY}"
        yield found


def check_server_error(response: Response, case: Case) -> None:
    """No 5xx but 503 with Retry-After, and 504 where the request set itself a deadline."""
    if response.status_code == 503:
        assert "retry-after" in response.headers
    elif response.status_code == 504:
        assert "X-Request-Timeout" in case.headers
    else:
        assert response.status_code < 500, response.text


@pytest.mark.timeout(1200 if FULL else 120)
@pytest.mark.parametrize(("path", "method", "mode"), CASES, ids=str)
def test_answers_are_as_documented(
    url: str, session: requests.Session, path: str, method: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path][method]

    @settings(
        max_examples=NUM_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        response = case.call(base_url=url, session=session, timeout=30)
        check_server_error(response, case)
        case.validate_response(response, checks=CHECKS)

    ask()


def test_every_answered_chat_is_closed_and_whole(url: str, session: requests.Session) -> None:
    """What schemathesis seldom gets to, for its chats are mostly refused: answers, with all that may be in them."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": "some words"}],
            "n": 2,
            "max_tokens": 4,
            "logprobs": True,
            "top_logprobs": 2,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        },
        "/v1/completions": {
            "prompt": ["some", "words"],
            "max_tokens": 4,
            "logprobs": 2,
            "echo": True,
            "prompt_logprobs": 1,
            "return_token_ids": True,
        },
        "/v1/responses": {"input": "some words", "max_output_tokens": 4, "top_logprobs": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": "some words"}], "max_tokens": 4},
        "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "some words"}]},
        "/tokenize": {"prompt": "some words", "return_token_strs": True},
        "/detokenize": {"tokens": [1, 2, 3]},
    }
    bodies = {path for (path, _), one in OPERATIONS.items() if "requestBody" in one}
    assert asked.keys() == bodies
    for path, body in asked.items():
        validator("request", path).validate(body)
        response = session.post(url + path, json=body, timeout=30)
        assert response.status_code == 200, response.text
        validator("200", path).validate(response.json())
        assert not validator("200", path).is_valid({**response.json(), "more": 1})


def test_stored_responses_are_as_documented(url: str, session: requests.Session) -> None:
    body = {"input": "some words", "max_output_tokens": 4, "background": True}
    made = session.post(f"{url}/v1/responses", json=body, timeout=30).json()
    place = f"{url}/v1/responses/{made['id']}"
    path = "/v1/responses/{response_id}"
    for schema, response in (
        (validator("200", path, "get"), session.get(place, timeout=30)),
        (validator("200", f"{path}/cancel"), session.post(f"{place}/cancel", timeout=30)),
        (validator("200", path, "delete"), session.delete(place, timeout=30)),
        (validator("404", path, "get"), session.get(place, timeout=30)),
    ):
        schema.validate(response.json())


@pytest.mark.parametrize(
    "body", [{"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}]
)
def test_a_stream_is_the_other_documented_content(
    url: str, session: requests.Session, body: dict[str, Any]
) -> None:
    content = OPERATIONS["/v1/completions", "post"]["responses"]["200"]["content"]
    answer = session.post(
        f"{url}/v1/completions", json={"prompt": "some", "max_tokens": 3, **body}, timeout=30
    )
    assert answer.headers["content-type"].split(";")[0] in content.keys() - {"application/json"}


def validator(which: str, path: str, method: str = "post") -> jsonschema_rs.Draft202012Validator:
    """Of the request's body, or of the response with this status."""
    operation = OPERATIONS[path, method]
    holder = operation["requestBody"] if which == "request" else operation["responses"][which]
    schema = holder["content"]["application/json"]["schema"]
    return jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def test_the_served_document_is_that_of_the_settings(url: str, session: requests.Session) -> None:
    response = session.get(f"{url}/openapi.json", timeout=30)
    assert response.json() == json.loads(json.dumps(DOCUMENT))


def test_every_operation_asks_for_a_key_where_the_document_says_so(url: str) -> None:
    for (path, method), operation in OPERATIONS.items():
        answer = requests.request(method, url + path.replace("{", "").replace("}", ""), timeout=30)
        is_open = operation.get("security") == []
        assert is_open == (path in OPEN_PATHS)
        assert (answer.status_code == 401) == (not is_open), path
    assert DOCUMENT["security"] == [{"bearer": []}, {"x-api-key": []}]
    assert requests.get(f"{url}/load", headers={"x-api-key": KEY}, timeout=30).status_code == 200


def test_methods_that_are_not_documented_are_not_taken(url: str, session: requests.Session) -> None:
    for path in DOCUMENT["paths"]:
        documented = {method for other, method in OPERATIONS if other == path}
        for method in {"get", "post", "put", "patch", "delete"} - documented:
            answer = session.request(method, url + path, timeout=30)
            assert answer.status_code == 405, (method, path)
            assert documented <= set(answer.headers["allow"].lower().split(", "))


def test_document_has_every_route_with_its_methods() -> None:
    mounted = set()
    for route in make_app(ServerContext(SETTINGS)).routes:
        assert isinstance(route, Route)
        if route.path != "/" and not route.path.startswith("/page/"):
            path = route.path.replace(":path}", "}")
            mounted |= {(path, method.lower()) for method in route.methods or () if method != "HEAD"}
    assert mounted == set(OPERATIONS)


def test_document_offers_only_what_the_server_takes() -> None:
    plain = make_document(ServerSettings())
    assert "security" not in plain
    assert "401" not in plain["paths"]["/v1/models"]["get"]["responses"]
    for document, has in ((plain, False), (DOCUMENT, True)):
        schemas = document["components"]["schemas"]
        chat = schemas["ChatRequest"]["properties"]
        assert not chat.keys() & REFUSED.keys()
        assert ("chat_template" in chat) == has
        assert ("background" in schemas["ResponsesRequest"]["properties"]) == has
        assert chat["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 2.0}
    assert make_document(ServerSettings(root_path="/llm/"))["servers"] == [{"url": "/llm"}]


def test_document_is_of_openapi_3_1() -> None:
    jsonschema_rs.Draft202012Validator(DOCUMENT["components"])  # raises where a reference leads nowhere
    assert DOCUMENT["openapi"].startswith("3.1.")
    identifiers = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(identifiers)) == len(identifiers)
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})
