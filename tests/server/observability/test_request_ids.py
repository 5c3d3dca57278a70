"""Request ids: taken or made, on every answer, and nothing depends on them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.fake_server import FakeEngine, Serve, Served

MADE = re.compile(r"[0-9a-f]{32}")


def test_an_id_that_comes_goes_out_again(served: Served) -> None:
    answer = served.client.get("/v1/models", headers={"X-Request-Id": "a.B-c_9"})
    assert answer.headers.get_list("x-request-id") == ["a.B-c_9"]


@pytest.mark.parametrize(
    ("path", "status"), [("/livez", 200), ("/none", 404), ("/v1/tasks/none", 404), ("/docs", 200)]
)
def test_every_answer_has_an_id(served: Served, path: str, status: int) -> None:
    answers = [served.client.get(path) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [status, status]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert all(map(MADE.fullmatch, ids))
    assert len(ids) == 2


def test_errors_and_streams_have_one_too(served: Served) -> None:
    own = {"x-request-id": "mine"}
    for body, status in (
        ({"prompt": "x", "stream": True}, 200),
        ({"prompt": 5}, 400),
        ({"prompt": "x", "task": "none"}, 404),
    ):
        answer = served.client.post("/v1/completions", json=body, headers=own)
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")


def test_an_unexpected_error_has_one_and_tells_nothing(serve: Serve) -> None:
    served = serve(FakeEngine(failure=ZeroDivisionError("0x7ffe12345678 /usr/lib secret")))
    answer = served.client.post(
        "/v1/completions", json={"prompt": "x", "max_tokens": 9}, headers={"x-request-id": "mine"}
    )
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert answer.json()["error"]["code"] == "internal_error"
    assert not re.search("0x[0-9a-f]{6,}|/usr|Traceback|secret", answer.text)
    assert 'route="/v1/completions",status="500"} 1.0' in served.client.get("/metrics").text


@pytest.mark.parametrize(
    "odd", ["", "a" * 65, "a b", "a/b", "é", "a;b", '"', "a" * 8000], ids=lambda odd: odd[:9]
)
def test_an_odd_id_is_refused(served: Served, odd: str) -> None:
    answer = served.client.get("/livez", headers=[(b"x-request-id", odd.encode("latin-1"))])
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "x-request-id")
    assert MADE.fullmatch(answer.headers["x-request-id"])
    assert "aa" not in answer.text


def test_two_ids_are_refused(served: Served) -> None:
    two = [("x-request-id", "a"), ("x-request-id", "b")]
    assert served.client.get("/livez", headers=two).status_code == 400


def test_requests_of_one_id_do_not_meet(served: Served) -> None:
    def complete(number: int) -> tuple[int, str]:
        body = {"prompt": "x", "max_tokens": 1 + number}
        answer = served.client.post(
            "/v1/completions", json=body, headers={"x-request-id": "the-same"}
        )
        return answer.json()["usage"]["completion_tokens"], answer.json()["id"]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(complete, range(64)))
    assert [tokens for tokens, _ in found] == list(range(1, 65))
    assert len({made for _, made in found}) == 64
    assert len({request.id for request in served.engine.requests}) == 64
