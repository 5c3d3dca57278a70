"""The server's own faults: clients that leave, an engine that fails, too much at once."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from polyrex.server.errors import EngineError, StorageError
from polyrex.server.registry.edits import TaskEdits
from support.fake_server import FakeEngine, Serve, Served
from support.tenants.identities import bearer, make_key, make_tenant

from .test_completions import events


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for ten seconds at least."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("the condition never held")


def send(served: Served, body: dict[str, object], **headers: str) -> socket.socket:
    """Open a connection and send a completion request on it."""
    port = served.client.base_url.port or 0
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"{lines}Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_ends_its_requests(serve: Serve, stream: bool, n: int) -> None:
    served = serve(FakeEngine(hang=True), max_in_flight=n)
    with send(served, {"prompt": "x", "stream": stream, "n": n}):
        eventually(lambda: len(served.engine.running) == n)
    eventually(lambda: len(served.engine.aborted) == n)
    served.engine.hang = False
    eventually(lambda: served.complete(n=n).status_code == 200)  # and its place is free again


def test_a_request_that_fails_in_the_engine_is_500(serve: Serve) -> None:
    served = serve(FakeEngine(failure=EngineError("out of blocks")))
    response = served.complete()
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "out of blocks"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_tells_nothing_of_itself(serve: Serve) -> None:
    served = serve(FakeEngine(failure=RuntimeError("/secret/path 0xdeadbeef")))
    response = served.complete()
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed on this request"


def test_one_failing_choice_ends_the_others(serve: Serve) -> None:
    served = serve(FakeEngine(failure=EngineError("no")))
    assert served.complete(n=4).status_code == 500
    assert not served.engine.running


@pytest.mark.parametrize("failure", [EngineError("broken"), RuntimeError("secret")])
def test_a_stream_that_fails_ends_with_an_error_and_no_done(
    serve: Serve, failure: Exception
) -> None:
    served = serve(FakeEngine(failure=failure))
    *_, last = events(served, prompt="x", max_tokens=5)
    assert json.loads(last)["error"]["type"] == "server_error"
    assert "secret" not in last


def test_a_stream_that_fails_before_its_first_token_is_an_error_response(serve: Serve) -> None:
    served = serve()
    served.engine.down = True
    response = served.complete(stream=True)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


def test_more_than_the_limit_is_429(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), max_in_flight=2)
    with send(served, {"prompt": "x", "n": 2}):
        eventually(lambda: len(served.engine.running) == 2)
        refused = served.complete()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
    served.engine.hang = False
    eventually(lambda: served.complete().status_code == 200)


def test_more_completions_than_can_ever_be_admitted_are_400(serve: Serve) -> None:
    served = serve(FakeEngine(), max_in_flight=3)
    assert served.complete(n=4).status_code == 400


def test_not_ready_while_the_engine_starts(serve: Serve) -> None:
    gate = threading.Event()
    served = serve(FakeEngine(start_delay=gate))
    assert served.client.get("/readyz").status_code == 503
    assert served.client.get("/livez").status_code == 200
    assert served.complete().status_code == 503
    gate.set()
    eventually(lambda: served.client.get("/readyz").status_code == 200)
    assert served.complete().status_code == 200


def test_neither_alive_nor_ready_when_the_engine_failed_to_start(serve: Serve) -> None:
    served = serve(FakeEngine(down=True, failure=RuntimeError("no memory")))
    assert served.client.get("/readyz").status_code == 503
    assert served.client.get("/livez").status_code == 503


def test_neither_alive_nor_ready_when_the_engine_is_down(served: Served) -> None:
    assert served.client.get("/readyz").status_code == 200
    served.engine.down = True
    assert served.client.get("/readyz").status_code == 503
    assert served.client.get("/livez").status_code == 503


def test_metrics_count_requests_without_labels_of_the_clients_making(served: Served) -> None:
    served.complete(task="no-such-task")
    served.complete(max_tokens=2)
    served.client.request("PROPFIND", "/made/up/path")
    text = served.client.get("/metrics").text
    labels = 'engine="0",finished_reason="length",model_name="base"'
    assert f"vllm:request_success_total{{{labels}}} 1.0" in text
    assert 'vllm:num_requests_waiting{engine="0",model_name="base"} 0.0' in text
    assert 'vllm:prompt_tokens_total{engine="0",model_name="base"} 11.0' in text
    assert 'polyrex_adapter_steps_total{path="composed"} 5.0' in text
    assert 'polyrex_http_requests_total{method="other",route="none",status="404"} 1.0' in text
    assert "no-such-task" not in text
    assert "made/up" not in text


def test_a_tenant_that_floods_does_not_keep_others_out(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), max_in_flight=4)
    make_tenant(served.client, "acme", concurrent=2)
    acme = bearer(make_key(served.client, "acme", "inference"))
    with send(served, {"prompt": "x", "n": 1}):  # somebody else's
        eventually(lambda: len(served.engine.running) == 1)
        with ExitStack() as flood:
            for _ in range(8):
                body = {"prompt": "x", "max_tokens": 5}
                flood.enter_context(send(served, body, **acme))
            eventually(lambda: len(served.engine.running) == 3)
            refused = served.client.post("/v1/completions", json=body, headers=acme)
            served.engine.hang = False
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert served.complete().status_code == 200


@pytest.mark.parametrize("error", [StorageError("away"), KeyError("of ours")])
def test_a_purge_that_fails_is_not_the_last_one(
    serve: Serve,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    purges = threading.Semaphore(0)

    def fail(_edits: TaskEdits, _before: float) -> int:
        purges.release()
        raise error

    monkeypatch.setattr(TaskEdits, "purge", fail)
    monkeypatch.setattr("polyrex.server.http.app._PURGE_SECONDS", 0.01)
    serve()
    assert all(purges.acquire(timeout=10) for _ in range(3))
    assert "dropped tasks are not purged" in caplog.text
