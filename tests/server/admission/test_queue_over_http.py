"""The queue before the engine, as clients of a real server meet it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from support.fake_server import FakeEngine, Serve, Served
from support.observability.waiting import eventually
from support.sockets.raw import connected, request
from support.tenants.identities import bearer, make_key, make_tenant

WORDS = {"prompt": "x", "max_tokens": 5}


@contextmanager
def send(served: Served, body: dict[str, object]) -> Iterator[socket.socket]:
    """A client that has sent a request, and leaves when the context ends."""
    with connected(served.client.base_url.port or 0) as connection:
        connection.sendall(request("POST", "/v1/completions", body))
        yield connection


def in_flight(served: Served) -> int:
    """Completions that wait or run."""
    lines = served.client.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith("polyrex_in_flight "))
    return int(float(line.split()[1]))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_it_waits_frees_its_place(serve: Serve, stream: bool) -> None:
    served = serve(FakeEngine(hang=True, most_running=1), max_queue_seconds=1000.0)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(send(served, WORDS))
        eventually(lambda: len(served.engine.running) == 2)
        with send(served, WORDS | {"stream": stream, "n": 3}):
            eventually(lambda: in_flight(served) == 5)
        eventually(lambda: in_flight(served) == 2)
        assert len(served.engine.requests) == 2
    eventually(lambda: in_flight(served) == 0)


def test_a_refusal_comes_before_anything_is_prepared(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True, most_running=1), max_in_flight=2)
    unknown = {"prompt": [10**6], "max_tokens": 1}  # no token of this model
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(send(served, WORDS))
        eventually(lambda: len(served.engine.running) == 2)
        refused = served.complete(**unknown)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: served.complete(**unknown).status_code == 400)


def test_a_server_that_others_fill_answers_503(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), max_in_flight=2)
    make_tenant(served.client, "acme")
    acme = bearer(make_key(served.client, "acme", "inference"))
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(send(served, WORDS))
        eventually(lambda: len(served.engine.running) == 2)
        refused = served.client.post("/v1/completions", json=WORDS, headers=acme)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_full")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_request_whose_time_is_over_in_the_queue_is_504_and_never_started(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True, most_running=1))
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(send(served, WORDS))
        eventually(lambda: len(served.engine.running) == 2)
        headers = {"x-polyrex-timeout": "0.3"}
        late = served.client.post("/v1/completions", json=WORDS, headers=headers)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert (in_flight(served), len(served.engine.requests)) == (2, 2)


def test_a_request_that_has_waited_too_long_is_503_and_never_started(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True, most_running=1), max_queue_seconds=0.3)
    with ExitStack() as running:
        for _ in range(2):
            running.enter_context(send(served, WORDS))
        eventually(lambda: len(served.engine.running) == 2)
        late = served.complete()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "server_full")
        assert (in_flight(served), len(served.engine.requests)) == (2, 2)


def test_more_choices_than_the_engine_runs_at_once_are_answered(serve: Serve) -> None:
    served = serve(FakeEngine(most_running=2))
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda _: served.complete(n=8, max_tokens=3), range(8)))
    assert [len(answer.json()["choices"]) for answer in answers] == [8] * 8
    assert len(served.engine.requests) == 64
    assert in_flight(served) == 0


def test_a_refused_request_does_not_count_in_its_tenants_quota(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), max_in_flight=1)
    make_tenant(served.client, "acme", requests_per_minute=1)
    acme = bearer(make_key(served.client, "acme", "inference"))
    with send(served, WORDS):
        eventually(lambda: len(served.engine.running) == 1)
        refused = served.client.post("/v1/completions", json=WORDS, headers=acme)
        assert refused.status_code == 503
    served.engine.hang = False
    eventually(lambda: in_flight(served) == 0)
    answer = served.client.post("/v1/completions", json=WORDS, headers=acme)
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"


def test_a_tenant_has_a_weight_that_can_change(served: Served) -> None:
    make_tenant(served.client, "acme", weight=3)
    acme = bearer(make_key(served.client, "acme", "inference"))
    assert served.client.get("/v1/whoami", headers=acme).json()["quotas"]["weight"] == 3
    for body, status, weight in (({"weight": 0}, 400, 3), ({"weight": None}, 200, None)):
        changed = served.client.patch("/v1/tenants/acme", json={"quotas": body})
        assert changed.status_code == status
        shown = served.client.get("/v1/tenants/acme").json()
        assert shown["quotas"]["weight"] == weight
    answer = served.client.post("/v1/completions", json=WORDS, headers=acme)
    assert answer.status_code == 200
