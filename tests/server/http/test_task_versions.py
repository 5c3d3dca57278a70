"""Versions over HTTP: pinned, rolled back, named by aliases, tried on a share of the requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from polyrex.server.engines.base import GenerationRequest, TokenChunk
from support.fake_server import FakeEngine, Serve, Served
from support.random_inventory import MakeRouter
from support.tenants.identities import client_of, make_key, make_tenant

BINARY = {"content-type": "application/octet-stream"}
UNKNOWN = "no such task, or not for this key"


@pytest.fixture
def one(served: Served, make_router: MakeRouter) -> list[str]:
    """The task `one` with three versions; their routers' hashes."""
    return [
        served.client.put("/v1/tasks/one", content=make_router(seed), headers=BINARY).json()[
            "router_sha256"
        ]
        for seed in (1, 2, 3)
    ]


def answering(served: Served, task: str, **body: object) -> str:
    """The version that answers a request."""
    response = served.complete(task=task, max_tokens=1, **body)
    return response.headers["x-polyrex-task-version"]


def test_the_versions_of_a_task_are_listed(
    served: Served, make_router: MakeRouter, one: list[str]
) -> None:
    listed = served.client.get("/v1/tasks/one/versions").json()
    assert listed["object"] == "list"
    assert [version["version"] for version in listed["data"]] == [1, 2, 3]
    assert [version["router_sha256"] for version in listed["data"]] == one
    assert {version["servable"] for version in listed["data"]} == {True}
    assert served.client.get("/v1/tasks/none/versions").status_code == 404


def test_a_version_is_used_and_shown_by_its_number(served: Served, one: list[str]) -> None:
    assert answering(served, "one@2") == "one@2"
    shown = served.client.get("/v1/tasks/one@2").json()
    assert (shown["version"], shown["current_version"]) == (2, 3)
    assert shown["router_sha256"] == one[1]
    model = served.client.get("/v1/models/one@2").json()
    assert (model["id"], model["parent"]) == ("one@2", "base")
    assert served.complete(model="one@2").json()["model"] == "one@2"
    for path in ("/v1/tasks/one@4", "/v1/models/one@4", "/v1/tasks/one@prod"):
        gone = served.client.get(path)
        assert (gone.status_code, gone.json()["error"]["message"]) == (404, UNKNOWN)


def test_roll_back_and_promote(served: Served, one: list[str]) -> None:
    back = served.client.post("/v1/tasks/one/rollback", json={})
    assert (back.json()["version"], back.json()["last_version"]) == (2, 3)
    assert answering(served, "one") == "one@2"
    there = served.client.post("/v1/tasks/one/rollback", json={"version": 3})
    assert there.json()["version"] == 3
    assert answering(served, "one") == "one@3"
    assert served.client.post("/v1/tasks/one/rollback", json={"version": 4}).status_code == 404


class GatedEngine(FakeEngine):
    """Goes on after its first token when the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        async for chunk in super().generate(request):
            yield chunk
            while not self.gate.is_set():
                await asyncio.sleep(0.01)


def test_a_request_under_way_keeps_its_version(serve: Serve, make_router: MakeRouter) -> None:
    engine = GatedEngine()
    served = serve(engine)
    for seed in (1, 2):
        served.client.put("/v1/tasks/one", content=make_router(seed), headers=BINARY)
    body = {"prompt": "Hello", "task": "one", "stream": True, "max_tokens": 3}
    with served.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        events = [next(lines)]
        assert served.client.post("/v1/tasks/one/rollback", json={}).json()["version"] == 1
        assert len(engine.running) == 1
        engine.gate.set()
        events += [line for line in lines if line.startswith("data: {")]
    assert len(events) > 2
    assert all('"system_fingerprint": "one@2:' in event for event in events)
    assert answering(served, "one") == "one@1"


def test_an_alias_means_a_version(served: Served, one: list[str]) -> None:
    path = "/v1/tasks/one/aliases/prod"
    assert served.client.put(path, json={"version": 1}).json()["aliases"] == {"prod": 1}
    assert answering(served, "one@prod") == "one@1"
    assert served.client.put(path, json={"version": 2}).json()["aliases"] == {"prod": 2}
    assert answering(served, "one@prod") == "one@2"
    assert served.client.get("/v1/tasks/one@prod").json()["version"] == 2
    assert served.client.delete(path).json()["aliases"] == {}
    assert served.complete(task="one@prod").status_code == 404
    assert served.client.delete(path).status_code == 404
    assert served.client.put("/v1/tasks/one/aliases/3", json={"version": 1}).status_code == 400


def test_a_canary_answers_a_share_of_the_requests_and_is_counted(
    served: Served, one: list[str]
) -> None:
    canary = {"version": 1, "share": 0.5}
    made = served.client.put("/v1/tasks/one/canary", json=canary).json()
    assert made["canary"] == canary | {"requests": {}}
    users = [f"user-{number}" for number in range(40)]
    first = [answering(served, "one", user=user) for user in users]
    assert set(first) == {"one@1", "one@3"}
    assert [answering(served, "one", user=user) for user in users] == first
    counted = served.client.get("/v1/tasks/one").json()["canary"]["requests"]
    assert counted == {"1": 2 * first.count("one@1"), "3": 2 * first.count("one@3")}
    assert answering(served, "one@3", user="user-0") == "one@3"
    assert served.client.delete("/v1/tasks/one/canary").json()["canary"] is None
    assert {answering(served, "one", user=user) for user in users} == {"one@3"}


def test_a_guest_does_not_see_how_many_requests_others_sent(served: Served, one: list[str]) -> None:
    make_tenant(served.client, "guest")
    served.client.put("/v1/tasks/one/shared_with/guest", json={}).raise_for_status()
    served.client.put("/v1/tasks/one/canary", json={"version": 1, "share": 1}).raise_for_status()
    assert answering(served, "one") == "one@1"
    with client_of(served.url, make_key(served.client, "guest", "inference")) as guest:
        seen = guest.get("/v1/tasks/default:one").json()
        listed = guest.get("/v1/tasks/default:one/versions").json()
    assert seen["canary"] == {"version": 1, "share": 1, "requests": None}
    own = served.client.get("/v1/tasks/one").json()
    assert own["canary"]["requests"] == {"1": 1}
    # Each version can be shown to the guest by its number, and so the list tells him nothing new.
    assert listed == served.client.get("/v1/tasks/one/versions").json()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("canary", {"version": 1, "share": 1.5}, 400),
        ("canary", {"version": 1, "share": -0.1}, 400),
        ("canary", {"version": 1}, 400),
        ("canary", {"version": 3, "share": 0.5}, 400),
        ("canary", {"version": 9, "share": 0.5}, 404),
        ("aliases/prod", {"version": 0}, 400),
        ("aliases/prod", {"version": "1"}, 400),
        ("aliases/prod", {"version": 1, "also": 2}, 400),
        ("aliases/prod", {"version": 9}, 404),
        ("labels", ["a"], 400),
        ("labels", {"a": 1}, 400),
    ],
)
def test_a_wrong_change_of_a_version_changes_nothing(
    served: Served, one: list[str], path: str, body: object, status: int
) -> None:
    before = served.client.get("/v1/tasks/one")
    assert served.client.put(f"/v1/tasks/one/{path}", json=body).status_code == status
    after = served.client.get("/v1/tasks/one")
    assert (after.json(), after.headers["etag"]) == (before.json(), before.headers["etag"])


def test_models_are_listed_in_pages(served: Served, one: list[str]) -> None:
    page = served.client.get("/v1/models", params={"limit": 1}).json()
    assert ([model["id"] for model in page["data"]], page["has_more"]) == (["base", "one"], False)
    rest = served.client.get("/v1/models", params={"after": "one"}).json()
    assert (rest["data"], rest["has_more"]) == ([], False)


def test_changes_of_a_version_that_does_not_exist_are_all_the_same_404(
    served: Served, one: list[str]
) -> None:
    def ask(method: str, path: str, **body: Any) -> httpx.Response:
        return served.client.request(method, f"/v1/tasks/{path}", **body)

    answers = [
        ask("DELETE", "none"),
        ask("DELETE", "one@3"),
        ask("POST", "none/undelete", json={}),
        ask("POST", "none/rollback", json={"version": 1}),
        ask("POST", "one/rollback", json={"version": 9}),
        ask("PUT", "none/aliases/prod", json={"version": 1}),
        ask("DELETE", "one/aliases/prod"),
        ask("PUT", "one@3/canary", json={"version": 1, "share": 0.5}),
        ask("DELETE", "one/canary"),
        ask("PUT", "none/labels", json={}),
        ask("DELETE", "one/shared_with/nobody"),
    ]
    assert {(answer.status_code, answer.content) for answer in answers} == {
        (404, answers[0].content)
    }
