"""Requests that cannot be served get a status and a message, and the server goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from support.fake_server import FakeEngine, Serve, Served, serving
from support.random_inventory import MakeRouter


@pytest.fixture(scope="module")
def served(
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """One server for all tests: no bad request may harm it."""
    folder = tmp_path_factory.mktemp("tasks")
    with serving(folder, random_inventory, tokenizer, FakeEngine()) as running:
        yield running


CHAT = {"messages": [{"role": "user", "content": "Why?"}]}


def check_refused(served: Served, path: str, body: Any, status: int, *words: str) -> None:
    raw = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = served.client.post(path, headers={"content-type": "application/json"}, **raw)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    assert served.engine.requests == []
    assert served.complete(max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"unheard_of": None}, "unheard_of"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"] * 100}, "prompt"),
        ({"prompt": "word " * 300}, "prompt has 301 tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**6}, "context holds 256"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "other"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"model": 3}, "model"),
        ({"model": "x" * 257}, "model"),
        ({"task": "x" * 257}, "task"),
        ({"user": "x" * 257}, "user"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"prompt": [2**31]}, "prompt"),
        ({"prompt": "x " * 400_000}, "more than 240 tokens"),
        ({"n": 10**9}, "n"),
        ({"logprobs": -1}, "logprobs"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"request_id": "x"}, "request_id"),
    ],
)
def test_a_bad_field_of_a_completion_is_400(
    served: Served, fields: dict[str, Any], word: str
) -> None:
    check_refused(served, "/v1/completions", {"prompt": "Hello", **fields}, 400, word)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"unheard_of": 1}, "unheard_of"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 400_000}]}, "more than 255 tokens"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "x" * 257}]}, "messages"),
    ],
)
def test_a_bad_field_of_a_chat_is_400(served: Served, fields: dict[str, Any], word: str) -> None:
    check_refused(served, "/v1/chat/completions", CHAT | fields, 400, word)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b'"text"',
        b"\xff\xfe\xfa",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "prompt": "x"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: body[:40].decode(errors="replace"),
)
def test_what_is_no_json_object_is_400(served: Served, body: bytes) -> None:
    check_refused(served, "/v1/completions", body, 400)


@pytest.fixture(autouse=True)
def _forget(served: Served) -> None:
    served.engine.requests.clear()


def test_neutral_values_of_what_is_not_offered_are_taken(served: Served) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "best_of": 1,
        "suffix": None,
        "user": "somebody",
    }
    assert served.complete(**neutral).status_code == 200


def test_unknown_task_is_404(served: Served) -> None:
    body = {"prompt": "Hello", "task": "nobody"}
    check_refused(served, "/v1/completions", body, 404, "no such task")


def test_unknown_model_is_404(served: Served) -> None:
    body = CHAT | {"model": "nobody"}
    check_refused(served, "/v1/chat/completions", body, 404, "no such model or task", "base")


def test_model_and_task_that_differ_are_400(served: Served) -> None:
    body = {"prompt": "Hello", "model": "one", "task": "other"}
    check_refused(served, "/v1/completions", body, 400, "one", "other")


def test_unknown_route_is_404_in_openais_shape(served: Served) -> None:
    response = served.client.get("/v1/nothing")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_wrong_method_is_405(served: Served) -> None:
    assert served.client.get("/v1/completions").status_code == 405


@pytest.mark.parametrize("declared", [True, False])
def test_an_oversized_body_is_413(serve: Serve, declared: bool) -> None:
    served = serve(FakeEngine(), max_body_bytes=1000)
    content: Any = b"x" * 10_000
    if not declared:
        content = iter([b"x" * 600] * 10)  # chunked: no Content-Length to judge by
    response = served.client.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert served.complete().status_code == 200


@pytest.mark.parametrize("headers", [{"x-big": "x" * 20_000}, {f"x-{i}": "y" for i in range(150)}])
def test_oversized_headers_are_431(served: Served, headers: dict[str, str]) -> None:
    response = served.client.get("/v1/models", headers=headers)
    assert response.status_code in (400, 431)  # h11 refuses the largest before we see them
    assert served.complete().status_code == 200


@pytest.mark.parametrize("name", ["base", "default:base", "other:base"])
def test_no_task_takes_the_base_models_name(
    served: Served, make_router: MakeRouter, name: str
) -> None:
    headers = {"content-type": "application/octet-stream"}
    sent = [
        served.client.put(f"/v1/tasks/{name}", content=make_router(1), headers=headers),
        served.client.post(
            "/v1/tasks", params={"name": name}, content=make_router(1), headers=headers
        ),
    ]
    assert {response.status_code for response in sent} == {400}
    errors = [response.json()["error"] for response in sent]
    assert errors[0] == errors[1]
    assert (errors[0]["message"], errors[0]["param"]) == (
        f"'{name}' is the base model's name",
        "name",
    )


@pytest.mark.parametrize("temperature", [5e-324, 1e-300])
def test_a_temperature_near_zero_is_taken(served: Served, temperature: float) -> None:
    assert served.complete(temperature=temperature).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "k" * 1_000_000: 1},
        {"prompt": "x", "stop": ["x" * 1_000_000]},
        {"prompt": "x", "model": "x" * 1_000_000},
        {"prompt": [[7] * 100_000 + ["x" * 100_000]]},
        {"prompt": "x", "stream_options": {"k" * 1_000_000: 1}},
    ],
    ids=lambda body: str(list(body))[:40],
)
def test_an_error_is_short_whatever_the_body(served: Served, body: Any) -> None:
    error = served.client.post("/v1/completions", json=body).json()["error"]
    assert len(error["message"]) <= 300
    assert len(error["param"]) <= 80


@pytest.mark.parametrize(
    "messages",
    [
        [7],
        [{"role": "user", "content": [7]}],
        [{"role": "user", "content": [{"type": "text", "text": "x", "k": 1}]}],
        [{"role": "user", "content": {}}],
    ],
)
def test_an_error_names_nothing_of_the_code(served: Served, messages: Any) -> None:
    response = served.client.post("/v1/chat/completions", json={"messages": messages})
    message = response.json()["error"]["message"]
    assert message.startswith(("messages: ", "unknown field 'messages."))
    for word in ("Message", "TextPart", "constrained", "function", "list["):
        assert word not in message
