"""The OpenAPI document says of every route what it takes and answers, and nothing else comes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.files.inventory import Inventory
from polyrex.server import errors as server_errors
from polyrex.server.http.access import ACCESS
from polyrex.server.http.error_handlers import answer_to
from polyrex.server.http.openapi import shapes
from polyrex.server.http.openapi.answers import FIRST, GUARD, ROUTES
from support.fake_server import FakeEngine, Served, serving
from support.random_inventory import MakeRouter
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    bearer,
    client_of,
    make_key,
    make_tenant,
)

OCTETS = {"content-type": "application/octet-stream"}
Route = tuple[str, str]
Document = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A server that asks for keys, its document, and keys of two roles."""

    served: Served
    lora: Path
    client: httpx.Client
    document: Document
    inference: str
    metrics: str


@pytest.fixture(scope="module")
def asked(
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("tasks")
    lora = folder / "lora"
    lora.mkdir()
    options: dict[str, Any] = {"api_key_digests": OPERATOR_DIGESTS, "lora_dir": lora}
    with (
        serving(folder, random_inventory, tokenizer, FakeEngine(), **options) as served,
        client_of(served.url, OPERATOR_KEY) as client,
    ):
        make_tenant(client, "acme")
        keys = [make_key(client, "acme", role) for role in ("inference", "metrics")]
        yield Asked(served, lora, client, client.get("/openapi.json").json(), *keys)


def breach(document: Document, route: Route, response: httpx.Response) -> str | None:
    """How an answer breaks what the document says of it; None where it does not."""
    method, path = route
    answers = document["paths"][path][method.lower()]["responses"]
    said = answers.get(str(response.status_code))
    if said is None:
        return f"{response.status_code} is not declared"
    if "$ref" in said:
        said = document["components"]["responses"][said["$ref"].rsplit("/", 1)[1]]
    kind = response.headers.get("content-type", "").partition(";")[0]
    if not said["content"]:
        return f"{response.status_code}: {kind} is not declared" if kind else None
    kinds = {name.partition(";")[0]: body for name, body in said["content"].items()}
    if kind not in kinds:
        return f"{response.status_code}: {kind} is not declared"
    reference = kinds[kind].get("schema", {}).get("$ref")
    if reference is not None:
        shape: type[BaseModel] = getattr(shapes, reference.rsplit("/", 1)[1])
        shape.model_validate_json(response.content, strict=True)
    missing = [
        name
        for name, header in said["headers"].items()
        if header["required"] and name not in response.headers
    ]
    return f"{response.status_code} lacks {missing}" if missing else None


BODIES: dict[Route, Any] = {
    ("POST", "/v1/completions"): {"prompt": "Hello", "max_tokens": 2, "logprobs": 2},
    ("POST", "/v1/chat/completions"): {
        "messages": [{"role": "user", "content": "Hello"}],
        "logprobs": True,
        "top_logprobs": 2,
    },
    ("PUT", "/v1/tasks/{name}/labels"): {"a": "b"},
    ("POST", "/v1/tasks/{name}/rollback"): {},
    ("PUT", "/v1/tasks/{name}/aliases/{alias}"): {"version": 1},
    ("PUT", "/v1/tasks/{name}/canary"): {"version": 1, "share": 0.5},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "loaded", "lora_path": "r.safetensors"},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "loaded"},
    ("POST", "/v1/tenants"): {"name": "newcomer"},
    ("PATCH", "/v1/tenants/{name}"): {"quotas": {"tasks": 3}},
    ("POST", "/v1/tenants/{name}/keys"): {"role": "inference"},
    ("POST", "/v1/keys/{key_id}/rotate"): {},
}
"""A good body of each route that has one."""

FIT = ("POST", "/v1/tasks/{name}/fit")
FIRST_ONES: list[Route] = [("POST", "/v1/tasks"), ("PUT", "/v1/tasks/{name}")]
LAST_ONES: list[Route] = [
    ("POST", "/v1/tasks/{name}/rollback"),  # ends the canary
    ("DELETE", "/v1/tasks/{name}"),
    ("POST", "/v1/tasks/{name}/undelete"),
]
BETWEEN = [route for route in ROUTES if route not in {*FIRST_ONES, *LAST_ONES, FIT}]
ORDER = [*FIRST_ONES, *sorted(BETWEEN, key=lambda route: route[0] == "DELETE"), *LAST_ONES]
"""What takes something away comes after what makes it."""


def filled(path: str, key_id: str) -> str:
    """A path with names of what is there."""
    name = "acme" if "tenants/{name}" in path else "plural"
    values = {"{name}": name, "{alias}": "prod", "{tenant}": "acme", "{key_id}": key_id}
    return re.sub(r"\{\w+\}", lambda found: values[found[0]], path)


def good(asked: Asked, route: Route, router: bytes) -> httpx.Response:
    """Ask a route as it wants to be asked."""
    method, path = route
    key_id = make_key(asked.client, "acme", "inference").split("_")[1]
    url = filled(path, key_id)
    if route in (("POST", "/v1/tasks"), ("PUT", "/v1/tasks/{name}")):
        query = {"name": "plural"} if method == "POST" else {}
        return asked.client.request(method, url, content=router, headers=OCTETS, params=query)
    body = BODIES.get(route)
    json = {"headers": {"content-type": "application/json"}} if body is None else {"json": body}
    return asked.client.request(method, url, **({} if method == "GET" else json))


def test_every_success_is_as_the_document_says(asked: Asked, make_router: MakeRouter) -> None:
    (asked.lora / "r.safetensors").write_bytes(make_router(7))
    found: dict[Route, int] = {}
    breaches = []
    for number, route in enumerate(ORDER):
        response = good(asked, route, make_router(number))
        found[route] = response.status_code
        breaches.append((route, breach(asked.document, route, response)))
    assert [each for each in breaches if each[1]] == []
    assert {route: status for route, status in found.items() if status >= 300} == {}
    assert set(ROUTES) - set(found) == {FIT}  # which starts a worker


def test_a_stream_is_as_the_document_says(asked: Asked) -> None:
    for route in (("POST", "/v1/completions"), ("POST", "/v1/chat/completions")):
        response = asked.client.post(route[1], json=BODIES[route] | {"stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert breach(asked.document, route, response) is None


def wrong_requests(asked: Asked, route: Route) -> Iterator[httpx.Request]:
    """Requests for what is not there, from nobody, with too much, and with what is wrong."""
    method, path = route
    url = re.sub(r"\{\w+\}", "nothing", path)
    json = {"content-type": "application/json"}
    body = b"" if method == "GET" else b"{}"
    headers: list[dict[str, str]] = [
        json,
        json | bearer("wrong"),
        json | bearer(asked.inference),
        json | bearer(asked.metrics),
        json | {"x-big": "a" * 14_000, "x-bigger": "a" * 14_000},
        json | {"if-match": '"1"'},
        json | {"if-match": "nonsense"},
        json | {"if-none-match": "*", "idempotency-key": "a"},
        json | {"x-polyrex-min-revision": "99999999"},
        json | {"x-polyrex-min-revision": "x"},
        json | {"x-polyrex-timeout": "soon"},
        {"content-type": "text/plain"},
    ]
    build = asked.client.build_request
    yield from (build(method, url, content=body, headers=each) for each in headers)
    if method != "GET":
        yield build(method, url, content=b"not json", headers=json)
        yield build(method, url, content=b'{"unknown": 1}', headers=json)
        yield build(method, url, content=b"not a router", headers=OCTETS)
        yield build(method, url, content=b"x" * (2 << 20), headers=json)
        good_one = BODIES.get(route)
        yield build(method, url, json=good_one)
        for version in (9, -1):
            yield build(method, url.replace("nothing", "plural"), json={"version": version})
    yield build(method, url, params={"limit": "x", "name": "a:b"})


def test_every_refusal_is_as_the_document_says(
    asked: Asked, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyrex.server.http.conditions.REPLICA_WAIT", 0.01)
    asked.client.put("/v1/tasks/plural", content=make_router(0), headers=OCTETS)
    breaches, statuses = [], dict[Route, set[int]]()
    for route in ROUTES:
        for request in wrong_requests(asked, route):
            response = asked.client.send(request)
            statuses.setdefault(route, set()).add(response.status_code)
            found = breach(asked.document, route, response)
            if found is not None:
                breaches.append((route, found, response.text[:200]))
    assert breaches == []
    guarded = [route for route in ROUTES if not ACCESS[route].open]
    assert {route for route in guarded if not statuses[route] >= {400, 401, 431}} == set()
    changing = [route for route in ROUTES if route[0] != "GET"]
    assert {route for route in changing if not statuses[route] >= {413, 415}} == set()


def test_the_table_has_every_route() -> None:
    assert set(ROUTES) == set(ACCESS) - {
        ("GET", path) for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
    }


WITHIN_STREAMS = {server_errors.FitFailed}
TO_NOBODY = {server_errors.ClientDisconnected}
AT_START = {server_errors.StartError}


def test_every_error_of_the_server_is_declared_somewhere() -> None:
    known = {
        error
        for error in vars(server_errors).values()
        if isinstance(error, type) and issubclass(error, PolyrexError)
    }
    known -= {PolyrexError, server_errors.ServerError} | WITHIN_STREAMS | TO_NOBODY | AT_START
    declared = {error for answers in ROUTES.values() for error in answers.errors}
    declared |= {*FIRST, *GUARD}
    told = {(answer_to(error).status, answer_to(error).code) for error in declared}
    silent = [
        error for error in known if (answer_to(error).status, answer_to(error).code) not in told
    ]
    assert silent == []


def test_only_routes_that_are_open_to_anybody_need_no_key(asked: Asked) -> None:
    paths = asked.document["paths"]
    needs = {
        (method.upper(), path): operation.get("security")
        for path, item in paths.items()
        for method, operation in item.items()
    }
    expected: dict[Route, Any] = {
        route: None if ACCESS[route].open else [{"bearer": []}] for route in ROUTES
    }
    assert needs == expected


def test_a_server_without_keys_says_that_it_needs_none(served: Served) -> None:
    document = served.client.get("/openapi.json").json()
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}, {}]


def test_fields_that_are_not_required_may_be_null(asked: Asked) -> None:
    request = asked.document["components"]["schemas"]["CompletionRequest"]
    assert {"type": "null"} in request["properties"]["temperature"]["anyOf"]
    assert {"type": "null"} not in request["properties"]["prompt"].get("anyOf", ())
    body = BODIES["POST", "/v1/completions"] | dict.fromkeys(
        request["properties"].keys() - {"prompt", "max_tokens", "logprobs"}
    )
    assert asked.client.post("/v1/completions", json=body).status_code == 200


def test_uploads_are_declared_as_files_and_as_json(asked: Asked) -> None:
    for method, path in (("post", "/v1/tasks"), ("put", "/v1/tasks/{name}")):
        content = asked.document["paths"][path][method]["requestBody"]["content"]
        assert set(content) == {"application/json", "application/octet-stream"}


@pytest.mark.parametrize("method", ["OPTIONS", "PATCH", "TRACE"])
def test_a_method_that_a_path_does_not_have_is_told_all_that_it_has(
    served: Served, method: str
) -> None:
    response = served.client.request(method, "/v1/tasks/x")
    assert response.status_code == 405
    assert response.headers["allow"] == "DELETE, GET, PUT"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/tasks", "/v1/tenants"])
def test_a_wrong_limit_is_named(served: Served, path: str) -> None:
    for limit in ("x", "0", "1000000"):
        response = served.client.get(path, params={"limit": limit})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "limit"
        assert response.json()["error"]["message"].startswith("limit: ")
