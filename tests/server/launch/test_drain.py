"""How a server stops: what it answers meanwhile, and what it tells those whom it cuts off."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.fake_server import FakeEngine, Serve, Served
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.small_base import SmallBase
from support.sockets.raw import PATIENCE, answer, connected, request, rest

HANGING = {"prompt": "x", "max_tokens": 5}


def begin_to_stop(served: Served) -> None:
    """As a first signal would, and wait until it shows."""
    served.server.should_exit = True
    for _ in range(1000):
        if served.client.get("/readyz").status_code == 503:
            return
        time.sleep(0.01)
    raise AssertionError("the server is ready for ever")


def wait_for(served: Served, running: int) -> None:
    """Until the engine has so many requests."""
    for _ in range(1000):
        if len(served.engine.running) == running:
            return
        time.sleep(0.01)
    raise AssertionError("the requests never came")


def test_a_stopping_server_answers_new_requests_and_is_alive(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), drain_seconds=60)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.complete, max_tokens=5, stream=True)
        wait_for(served, 1)
        begin_to_stop(served)
        with connected(served.port) as connection:  # a new one
            connection.sendall(request("POST", "/v1/completions", HANGING))
            refused = answer(rest(connection))
        assert (refused.status, refused.error()["code"]) == (503, "server_shutdown")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert served.client.get("/livez").status_code == 200
        assert served.client.get("/metrics").status_code == 200
        assert not running.done()
        served.server.force_exit = True
        assert "server_shutdown" in running.result().text


def test_past_the_drain_streams_and_answers_end_with_an_error(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True), drain_seconds=0.5)
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(served.complete, max_tokens=5, stream=True)
        whole = pool.submit(served.complete, max_tokens=5)
        wait_for(served, 2)
        served.server.should_exit = True
        events, plain = stream.result().text.split("\n\n"), whole.result()
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "server_shutdown"
    assert "[DONE]" not in "".join(events)
    assert (plain.status_code, plain.json()["error"]["code"]) == (503, "server_shutdown")
    assert plain.headers["content-type"] == "application/json"
    assert len(served.engine.aborted) == 2


def test_a_request_whose_body_is_on_its_way_may_finish(serve: Serve) -> None:
    served = serve(FakeEngine(), drain_seconds=60)
    whole = request("POST", "/v1/completions", HANGING)
    with connected(served.port) as connection:
        connection.sendall(whole[:-5])
        time.sleep(0.2)  # until its headers are there
        begin_to_stop(served)
        connection.sendall(whole[-5:])
        assert answer(rest(connection)).status == 200


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("drain")
    with ForkServer(SmallBase.write(folder), folder) as servers:
        yield servers


WHOLE = request("POST", "/v1/completions", {"model": "small", **HANGING})
PATIENT = {"drain_seconds": 600, "header_seconds": 600, "body_seconds": 600}


@contextmanager
def half_a_request(server: Forked) -> Iterator[socket.socket]:
    """A request that runs until the rest of its body comes."""
    with connected(server.port) as connection:
        connection.sendall(WHOLE[:-5])
        time.sleep(0.2)  # until its headers are there
        yield connection


def test_a_signal_lets_requests_end_and_the_process_with_them(
    servers: ForkServer, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/r.db"
    with servers.serving(url, settings=PATIENT) as server, half_a_request(server) as running:
        os.kill(server.pid, signal.SIGTERM)
        with connected(server.port) as late:
            late.sendall(WHOLE)
            assert answer(rest(late)).error()["code"] == "server_shutdown"
        running.sendall(WHOLE[-5:])
        assert answer(rest(running)).status == 200
        assert server.ended(timeout=PATIENCE)
        assert server.status() == 0


def test_a_second_signal_does_not_wait(servers: ForkServer, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/r.db"
    with servers.serving(url, settings=PATIENT) as server, half_a_request(server) as running:
        os.kill(server.pid, signal.SIGINT)
        assert not server.ended(timeout=0.5)
        os.kill(server.pid, signal.SIGINT)
        told = answer(rest(running))
        assert (told.status, told.error()["code"]) == (503, "server_shutdown")
        assert server.ended(timeout=PATIENCE)
        assert server.status() == 0
