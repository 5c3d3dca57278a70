"""The time that a request may take, and what its client is told at the end of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from support.fake_server import FakeEngine, Serve, Served

SHORT = 0.3
CLIENTS = ({"x-polyrex-timeout": str(SHORT)}, {"x-envoy-expected-rq-timeout-ms": str(SHORT * 1000)})


def ask(served: Served, headers: dict[str, str], **body: object) -> httpx.Response:
    """A completion, of a client that says how long it will wait."""
    content = {"prompt": "x", "max_tokens": 5, **body}
    return served.client.post("/v1/completions", json=content, headers=headers)


def is_aborted(served: Served) -> bool:
    """Whether the engine has been told, and the place is free."""
    served.engine.hang = False
    return served.engine.running == set() and ask(served, {}, n=1).status_code == 200


def test_a_request_past_its_deadline_is_a_504(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), request_seconds=SHORT, max_in_flight=1)
    late = ask(served, {})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert is_aborted(served)


def test_a_stream_past_its_deadline_ends_with_an_error_and_no_done(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), request_seconds=SHORT, max_in_flight=1)
    events = ask(served, {}, stream=True).text.split("\n\n")
    *_, last, nothing = events
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert (nothing, "[DONE]" in "".join(events)) == ("", False)
    assert is_aborted(served)


@pytest.mark.parametrize("headers", CLIENTS, ids=["polyrex", "envoy"])
def test_a_client_may_ask_for_less_time(serve: Serve, headers: dict[str, str]) -> None:
    served = serve(FakeEngine(hang=True), max_in_flight=1)
    assert ask(served, headers).status_code == 504
    assert is_aborted(served)


@pytest.mark.parametrize("headers", CLIENTS, ids=["polyrex", "envoy"])
def test_a_client_gets_no_more_time_than_there_is(serve: Serve, headers: dict[str, str]) -> None:
    served = serve(FakeEngine(hang=True), request_seconds=SHORT)
    assert ask(served, dict.fromkeys(headers, "100000")).status_code == 504


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "1e3", "1" * 400, "soon"])
def test_a_time_that_is_no_number_is_a_400(served: Served, value: str) -> None:
    refused = ask(served, {"x-polyrex-timeout": value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-polyrex-timeout")


def test_a_slow_body_does_not_take_from_the_requests_time(serve: Serve) -> None:
    served = serve(request_seconds=SHORT)

    def slowly() -> Iterator[bytes]:
        yield b'{"prompt": "x",'
        time.sleep(2 * SHORT)
        yield b'"max_tokens": 2}'

    headers = {"content-type": "application/json"}
    asked = served.client.post("/v1/completions", content=slowly(), headers=headers)
    assert asked.status_code == 200
