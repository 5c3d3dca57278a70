"""Headers that tie a change to a state of the registry, and clients that race with them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from polyrex.server.http import conditions
from support.fake_server import Served
from support.random_inventory import MakeRouter

from .test_faults import eventually

BINARY = {"content-type": "application/octet-stream"}
CLIENTS, ROUNDS = 16, 12


def put(served: Served, name: str, router: bytes, **headers: str) -> httpx.Response:
    sent = BINARY | {key.replace("_", "-"): value for key, value in headers.items()}
    return served.client.put(f"/v1/tasks/{name}", content=router, headers=sent)


def post(served: Served, name: str, router: bytes, **headers: str) -> httpx.Response:
    sent = BINARY | {key.replace("_", "-"): value for key, value in headers.items()}
    return served.client.post("/v1/tasks", params={"name": name}, content=router, headers=sent)


def all_at_once(requests: Sequence[Callable[[], httpx.Response]]) -> list[httpx.Response]:
    """What clients are answered that race with each other."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [each.result() for each in [pool.submit(request) for request in requests]]


def test_answers_carry_the_revision_and_the_tasks_etag(
    served: Served, make_router: MakeRouter
) -> None:
    one = put(served, "one", make_router(1))
    two = put(served, "two", make_router(2))
    revision = int(two.headers["x-polyrex-revision"])
    assert int(one.headers["x-polyrex-revision"]) == revision - 1
    shown = served.client.get("/v1/tasks/one")
    assert shown.headers["etag"] == one.headers["etag"] == f'"{revision - 1}"'
    assert shown.headers["x-polyrex-revision"] == str(revision)
    for path in ("/v1/tasks", "/v1/tasks/one/versions"):
        assert served.client.get(path).headers["x-polyrex-revision"] == str(revision)
    same = put(served, "one", make_router(1))
    assert same.headers["etag"] == one.headers["etag"]
    dropped = served.client.delete("/v1/tasks/one")
    assert dropped.headers["x-polyrex-revision"] == str(revision + 1)


def test_if_match_changes_only_the_task_that_was_seen(
    served: Served, make_router: MakeRouter
) -> None:
    seen = put(served, "one", make_router(1)).headers["etag"]
    second = put(served, "one", make_router(2), if_match=seen)
    assert (second.status_code, second.json()["version"]) == (200, 2)
    late = put(served, "one", make_router(3), if_match=seen)
    assert (late.status_code, late.json()["error"]["code"]) == (412, "precondition_failed")
    assert served.client.get("/v1/tasks/one").json()["version"] == 2
    for method, path in (("DELETE", ""), ("DELETE", "/canary"), ("POST", "/undelete")):
        response = served.client.request(
            method,
            f"/v1/tasks/one{path}",
            headers={"if-match": seen, "content-type": "application/json"},
        )
        assert response.status_code == 412, path
    latest = second.headers["etag"]
    assert served.client.delete("/v1/tasks/one", headers={"if-match": latest}).status_code == 200


def test_if_match_of_anything_wants_the_task_to_be_there(
    served: Served, make_router: MakeRouter
) -> None:
    assert put(served, "one", make_router(1), if_match="*").status_code == 412
    put(served, "one", make_router(1))
    assert put(served, "one", make_router(2), if_match="*").json()["version"] == 2


def test_if_none_match_of_anything_wants_the_name_to_be_free(
    served: Served, make_router: MakeRouter
) -> None:
    assert put(served, "one", make_router(1), if_none_match="*").status_code == 201
    for router in (make_router(1), make_router(2)):
        assert put(served, "one", router, if_none_match="*").status_code == 412
    assert served.client.get("/v1/tasks/one").json()["version"] == 1
    served.client.delete("/v1/tasks/one")
    again = put(served, "one", make_router(2), if_none_match="*")
    assert (again.status_code, again.json()["version"]) == (201, 2)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if_match": "1"}, 412),  # an ETag is quoted
        ({"if_match": 'W/"1"'}, 412),  # a weak one never matches
        ({"if_match": '"x"'}, 412),
        ({"if_match": '"1", "2"'}, 412),
        ({"if_none_match": '"1"'}, 400),
        ({"if_none_match": "*", "if_match": "*"}, 400),
        ({"idempotency_key": "x" * 256}, 400),
        ({"idempotency_key": "a b"}, 400),
        ({"x_polyrex_min_revision": "-1"}, 400),
        ({"x_polyrex_min_revision": "soon"}, 400),
        ({"x_polyrex_min_revision": "9" * 19}, 400),
    ],
)
def test_a_condition_that_cannot_be_met_changes_nothing(
    served: Served, make_router: MakeRouter, headers: dict[str, str], status: int
) -> None:
    put(served, "one", make_router(1))
    assert put(served, "one", make_router(2), **headers).status_code == status
    assert served.client.get("/v1/tasks/one").json()["version"] == 1


@pytest.mark.parametrize("name", ["if-match", "if-none-match", "idempotency-key"])
def test_a_condition_that_comes_twice_is_400(
    served: Served, make_router: MakeRouter, name: str
) -> None:
    sent = [(name, "*"), (name, "*"), *BINARY.items()]
    response = served.client.put("/v1/tasks/one", content=make_router(1), headers=sent)
    assert response.status_code == 400
    assert name in response.json()["error"]["message"].lower()


@pytest.mark.parametrize("name", ["if-none-match", "idempotency-key"])
def test_a_condition_that_a_change_does_not_know_is_400(
    served: Served, make_router: MakeRouter, name: str
) -> None:
    put(served, "one", make_router(1))
    assert served.client.delete("/v1/tasks/one", headers={name: "*"}).status_code == 400
    assert served.client.get("/v1/tasks/one").status_code == 200


def test_a_request_repeated_with_its_key_has_the_first_result(
    served: Served, make_router: MakeRouter
) -> None:
    key = {"idempotency_key": "k" * 255}
    first = put(served, "one", make_router(1), **key)
    put(served, "one", make_router(2))
    again = put(served, "one", make_router(1), **key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert (again.json()["version"], again.json()["current_version"]) == (1, 2)
    assert again.json()["router_sha256"] == first.json()["router_sha256"]
    assert served.client.get("/v1/tasks/one").json()["version"] == 2


def test_a_key_that_comes_with_another_request_is_422(
    served: Served, make_router: MakeRouter
) -> None:
    put(served, "one", make_router(1), idempotency_key="key")
    for name, router in (("one", make_router(2)), ("two", make_router(1))):
        response = put(served, name, router, idempotency_key="key")
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "idempotency_mismatch"
    assert post(served, "one", make_router(1), idempotency_key="key").status_code == 422
    assert [task["name"] for task in served.client.get("/v1/tasks").json()["data"]] == ["one"]


def test_a_client_waits_for_the_revision_that_it_knows_of(
    served: Served, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "REPLICA_WAIT", 0.1)
    revision = put(served, "one", make_router(1)).headers["x-polyrex-revision"]
    for known in ("0", revision):
        headers = {"x-polyrex-min-revision": known}
        assert served.client.get("/v1/tasks/one", headers=headers).status_code == 200
        body = {"prompt": "Hello", "task": "one"}
        assert served.client.post("/v1/completions", json=body, headers=headers).status_code == 200
    ahead = {"x-polyrex-min-revision": str(int(revision) + 1)}
    for path in ("/v1/tasks/one", "/v1/models"):
        response = served.client.get(path, headers=ahead)
        assert (response.status_code, response.json()["error"]["code"]) == (
            503,
            "revision_not_reached",
        )
        assert response.headers["retry-after"] == "1"


def test_many_clients_that_wait_do_not_keep_others_from_their_answers(
    served: Served, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "REPLICA_WAIT", 20.0)
    asleep: set[asyncio.Task[Any] | None] = set()  # requests that wait

    async def sleep(seconds: float) -> None:
        asleep.add(asyncio.current_task())
        await asyncio.sleep(seconds)

    monkeypatch.setattr(conditions, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    revision = put(served, "one", make_router(1)).headers["x-polyrex-revision"]
    ahead = {"x-polyrex-min-revision": str(int(revision) + 2)}

    def wait(_: int) -> httpx.Response:
        return served.client.get("/v1/tasks/one", headers=ahead)

    with ThreadPoolExecutor(64) as pool:
        waiting = [pool.submit(wait, number) for number in range(64)]
        eventually(lambda: len(asleep) == 64)
        for seed in (2, 3):
            put(served, "one", make_router(seed))
        versions = {each.result().json()["version"] for each in waiting}
    assert versions == {3}


def test_of_clients_that_register_one_name_one_is_first(
    served: Served, make_router: MakeRouter
) -> None:
    routers = [make_router(seed) for seed in range(CLIENTS)]
    for number in range(ROUNDS):
        name = f"task-{number}"
        answers = all_at_once([partial(post, served, name, router) for router in routers])
        counted = Counter(answer.status_code for answer in answers)
        assert counted == {201: 1, 409: CLIENTS - 1}
        (won,) = [answer.json() for answer in answers if answer.status_code == 201]
        assert served.client.get(f"/v1/tasks/{name}").json() == won


def test_of_clients_that_register_the_same_one_is_first_and_all_agree(
    served: Served, make_router: MakeRouter
) -> None:
    router = make_router(1)
    for number in range(ROUNDS):
        name = f"task-{number}"
        answers = all_at_once([partial(post, served, name, router)] * CLIENTS)
        counted = Counter(answer.status_code for answer in answers)
        assert counted == {201: 1, 200: CLIENTS - 1}
        assert {answer.json()["version"] for answer in answers} == {1}


def test_no_update_is_lost_where_clients_say_what_they_saw(
    served: Served, make_router: MakeRouter
) -> None:
    etag = put(served, "one", make_router(0)).headers["etag"]
    for number in range(ROUNDS):
        routers = [make_router(1 + CLIENTS * number + client) for client in range(CLIENTS)]
        answers = all_at_once(
            [partial(put, served, "one", router, if_match=etag) for router in routers]
        )
        won = [answer for answer in answers if answer.status_code != 412]
        assert [answer.status_code for answer in won] == [200]
        etag = won[0].headers["etag"]
        current = served.client.get("/v1/tasks/one")
        assert (current.headers["etag"], current.json()) == (etag, won[0].json())


def test_one_request_sent_many_times_with_one_key_happens_once(
    served: Served, make_router: MakeRouter
) -> None:
    put(served, "one", make_router(0))
    for number in range(1, ROUNDS):
        once = partial(put, served, "one", make_router(number), idempotency_key=f"key-{number}")
        answers = all_at_once([once] * CLIENTS)
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["version"] for answer in answers} == {number + 1}
    assert len(served.client.get("/v1/tasks/one/versions").json()["data"]) == ROUNDS
