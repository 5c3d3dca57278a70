"""The log of a server: a line a request, and nothing that is nobody's business."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from polyrex.server.observability.logs import JsonLines
from support.fake_server import FakeEngine, Serve, Served
from support.observability.waiting import eventually
from support.random_inventory import MakeRouter
from support.tenants.identities import OPERATOR_DIGESTS, OPERATOR_KEY, bearer, make_key, make_tenant

OF_THE_CLIENT = ("httpx", "httpcore")
"""Loggers of the test's own client, which runs in the same process."""


class Log:
    """What a server logs, as JSON lines."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(JsonLines())
        self.handler.addFilter(lambda record: not record.name.startswith(OF_THE_CLIENT))

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self, logger: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.text.splitlines()]
        return [line for line in found if line["logger"] == logger]

    def access(self, request_id: str) -> dict[str, Any]:
        """The line of a request, which is written a moment after its answer."""
        eventually(lambda: bool(self._of(request_id)))
        (line,) = self._of(request_id)
        return line

    def _of(self, request_id: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("polyrex.access") if line["request_id"] == request_id]


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    """The log at level INFO, or at the parameter's level."""
    found, root = Log(), logging.getLogger()
    before = root.level
    root.setLevel(getattr(request, "param", logging.INFO))
    root.addHandler(found.handler)
    yield found
    root.removeHandler(found.handler)
    root.setLevel(before)


def complete(served: Served, request_id: str, **body: object) -> httpx.Response:
    return served.client.post(
        "/v1/completions",
        json={"prompt": "x", "max_tokens": 2, **body},
        headers={"x-request-id": request_id},
    )


def register(client: httpx.Client, name: str, data: bytes) -> None:
    headers = {"content-type": "application/octet-stream"}
    client.put(f"/v1/tasks/{name}", content=data, headers=headers).raise_for_status()


def test_a_request_has_one_line(log: Log, served: Served, make_router: MakeRouter) -> None:
    register(served.client, "plural", make_router(0))
    answer = complete(served, "one", task="plural")
    line = log.access("one")
    seconds = line.pop("seconds")
    del line["time"]
    assert 0 < seconds < 60
    assert line == {
        "level": "info",
        "logger": "polyrex.access",
        "message": "POST /v1/completions 200",
        "request_id": "one",
        "tenant": "default",
        "task": "plural",
        "version": 1,
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "bytes": len(answer.content),
    }


def test_a_streams_line_comes_when_it_has_ended(log: Log, served: Served) -> None:
    answer = complete(served, "two", stream=True)
    line = log.access("two")
    assert (line["status"], line["bytes"]) == (200, len(answer.content))


def test_errors_are_named(log: Log, serve: Serve) -> None:
    served = serve(FakeEngine(failure=RuntimeError("of the engine")))
    cases: list[tuple[dict[str, object], int, str]] = [
        ({"prompt": 5}, 400, "invalid_request"),
        ({"task": "none"}, 404, "task_not_found"),
        ({"max_tokens": 9}, 500, "internal_error"),
        ({"max_tokens": 9, "stream": True}, 200, "internal_error"),
    ]
    for number, (body, status, error) in enumerate(cases):
        complete(served, f"error-{number}", **body)
        line = log.access(f"error-{number}")
        assert (line["status"], line["error"]) == (status, error)


def test_an_unexpected_error_is_logged_with_its_request(log: Log, serve: Serve) -> None:
    served = serve(FakeEngine(failure=ZeroDivisionError("by hand")))
    complete(served, "broken", max_tokens=9)
    log.access("broken")
    (line,) = [each for each in map(json.loads, log.text.splitlines()) if "exception" in each]
    assert (line["request_id"], line["level"]) == ("broken", "error")
    assert "ZeroDivisionError: by hand" in line["exception"]


def test_paths_that_clients_make_up_are_not_repeated(log: Log, served: Served) -> None:
    served.client.get("/made/%0aup", headers={"x-request-id": "made-up"})
    line = log.access("made-up")
    assert (line["route"], line["status"]) == ("none", 404)
    assert "/made" not in log.text


def test_what_is_asked_all_the_time_is_quiet(log: Log, served: Served) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/v1/models"):
        served.client.get(path, headers={"x-request-id": path.strip("/").replace("/", "-")})
    log.access("v1-models")
    assert [line["route"] for line in log.lines("polyrex.access")] == ["/v1/models"]


@pytest.mark.parametrize("log", [logging.INFO, logging.DEBUG], indirect=True, ids=["info", "debug"])
def test_keys_prompts_and_routers_leak_nowhere(
    log: Log, serve: Serve, make_router: MakeRouter
) -> None:
    prompt, odd = "canary-of-the-prompt", "canary-of-a-wrong-field"
    router = make_router(0)
    served = serve(
        FakeEngine(failure=RuntimeError("of the engine")), api_key_digests=OPERATOR_DIGESTS
    )
    client = served.client
    client.headers.update(bearer(OPERATOR_KEY))
    make_tenant(client, "acme")
    key = make_key(client, "acme", "task-admin")
    own, wrong = bearer(key), bearer(key[:-1] + "?")
    shown = []
    for headers in (own, wrong, {"authorization": key}):
        for body in (
            {"prompt": prompt, "max_tokens": 1},
            {"prompt": prompt, "max_tokens": 9},
            {"prompt": prompt, "max_tokens": 9, "stream": True},
            {"prompt": prompt, "max_tokens": "many"},
            {"prompt": [prompt, 5]},
            {"prompt": prompt, "temperature": {odd: odd}},
        ):
            shown.append(client.post("/v1/completions", json=body, headers=headers))
        chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 9}
        shown.append(client.post("/v1/chat/completions", json=chat, headers=headers))
        octets = {**headers, "content-type": "application/octet-stream"}
        for data in (router, router[:-9], b"\x00" + router):
            shown.append(client.put("/v1/tasks/mine", content=data, headers=octets))
        encoded = {"name": "ours", "router": base64.b64encode(router).decode()[:-3]}
        shown.append(client.post("/v1/tasks", json=encoded, headers=headers))
    shown.append(client.get("/metrics"))
    log.access(shown[-2].headers["x-request-id"])
    assert {answer.status_code for answer in shown} >= {200, 201, 400, 401, 422, 500}
    secrets = {
        "the operator's key": OPERATOR_KEY,
        "a key": key.rpartition("_")[2],
        "a prompt": prompt,
        "a field": odd,
        "a router": base64.b64encode(router[-300:]).decode()[8:48],
        "a router's bytes": repr(router[-40:])[2:-1],
    }
    told = log.text + "".join(answer.text for answer in shown if answer.status_code != 200)
    told += "".join(str(answer.headers) for answer in shown) + shown[-1].text
    assert [what for what, secret in secrets.items() if secret in told] == []
    assert len(log.lines("polyrex.access")) >= len(shown) - 1
