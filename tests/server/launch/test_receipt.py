"""Requests that do not arrive, or not as they should: the connection ends, and the server lives."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack, suppress

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter, Gauge
from uvicorn.server import ServerState

from polyrex.server.config import ServerConfig
from polyrex.server.launch.connections import Connections
from polyrex.server.launch.protocol import ConnectionConfig, HttpConnection
from support.fake_server import FakeEngine, Serve, Served
from support.sockets.raw import answer, connected, request, rest

SMALL = {"header_seconds": 0.3, "body_seconds": 1.0, "keep_alive_seconds": 0.3}
COMPLETION = request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})
HEAD, _, BODY = COMPLETION.partition(b"\r\n\r\n")


def drip(connection: socket.socket, data: bytes) -> bytes:
    """Send again and again, a byte at a time, until the server closes; what it said."""
    received = bytearray()
    connection.settimeout(0.02)
    for number in range(10_000):
        with suppress(TimeoutError):
            piece = connection.recv(1 << 16)
            if not piece:
                return bytes(received)
            received += piece
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(data[number % len(data) :][:1])
    raise AssertionError("the server takes bytes for ever")


def test_a_connection_that_says_nothing_is_closed(serve: Serve) -> None:
    with connected(serve(**SMALL).port) as silent:
        assert rest(silent) == b""


def test_headers_that_never_end_are_a_408(serve: Serve) -> None:
    with connected(serve(**SMALL).port) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\n")
        told = answer(drip(slow, b"a: b\r\n"))
    assert (told.status, told.error()["code"]) == (408, "request_timeout")
    assert told.headers["connection"] == "close"


@pytest.mark.parametrize("dripping", [False, True], ids=["stalled", "dripping"])
def test_a_body_that_never_ends_is_a_408(serve: Serve, dripping: bool) -> None:
    # It would take 60 s if all the time counted, and not also the bytes of each second.
    served = serve(**(SMALL | {"body_seconds": 60.0}))
    with connected(served.port) as slow:
        slow.sendall(request("POST", "/v1/completions", **{"content-length": "9000"}))
        told = answer(drip(slow, b" ") if dripping else rest(slow))
    assert (told.status, told.error()["code"]) == (408, "request_timeout")
    assert served.engine.requests == []


def test_a_body_may_take_body_seconds_at_most(serve: Serve) -> None:
    served = serve(**(SMALL | {"header_seconds": 60.0}))
    with connected(served.port) as slow:
        slow.sendall(request("POST", "/v1/completions", **{"content-length": "9000"}))
        assert answer(drip(slow, b" ")).status == 408


def test_a_body_that_comes_in_pieces_is_served(serve: Serve) -> None:
    with connected(serve().port) as connection:
        for byte in COMPLETION:
            connection.send(bytes((byte,)))
        assert answer(connection.recv(1 << 16)).status == 200


@pytest.mark.parametrize("rest_of_it", [b"", b"SM\r\n\r\n", b"SM\r\n\r\n\x00\x00\x00\x04\x00\x00"])
def test_http_2_is_refused_at_once(serve: Serve, rest_of_it: bytes) -> None:
    with connected(serve().port) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\n" + rest_of_it)
        assert answer(connection.recv(1 << 16)).status == 400


def test_a_client_that_waits_for_100_continue_is_told_at_once(serve: Serve) -> None:
    with connected(serve().port) as connection:
        connection.sendall(HEAD + b"\r\nexpect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert answer(connection.recv(1 << 16)).status == 200


def test_an_answer_without_a_body_is_sent(serve: Serve) -> None:
    with connected(serve(**SMALL).port) as connection:
        for _ in range(2):
            connection.sendall(request("HEAD", "/openapi.json"))
            told = answer(connection.recv(1 << 16))
            assert (told.status, told.body) == (200, b"")
            assert int(told.headers["content-length"]) > 0


def test_an_idle_connection_is_kept_for_a_while_and_closed(serve: Serve) -> None:
    with connected(serve(**SMALL).port) as connection:
        connection.sendall(request("GET", "/livez"))
        connection.sendall(request("GET", "/livez"))
        assert rest(connection).count(b"200 OK") == 2


def test_three_hundred_idle_and_dripping_connections_are_closed(serve: Serve) -> None:
    served = serve(**(SMALL | {"header_seconds": 1.0}))
    with ExitStack() as opened:
        idle = [opened.enter_context(connected(served.port)) for _ in range(300)]
        for number, connection in enumerate(idle):
            connection.sendall((b"", b"GET / HT", HEAD[:-20], HEAD + b"\r\n\r\n{")[number % 4])
        assert served.client.get("/livez").status_code == 200
        said = [rest(connection) for connection in idle]
    assert {each.split(b"\r\n")[0] for each in said} == {b"", b"HTTP/1.1 408 Request Timeout"}


def test_a_connection_that_its_client_has_just_closed_is_no_error() -> None:
    """As when hundreds close at once: their deadline comes before the loop has seen it."""
    registry = CollectorRegistry()
    is_open = Gauge("open", "", registry=registry)
    closed = Counter("closed", "", ("reason",), registry=registry)
    limits = ServerConfig(model="base")
    config = ConnectionConfig(
        FastAPI(), limits, Connections(limits, is_open=is_open, closed=closed)
    )
    state = ServerState()

    async def close() -> float:
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: HttpConnection(config, state, {}), "127.0.0.1")
        with connected(listening.sockets[0].getsockname()[1]) as client:
            client.sendall(b"GET / HT")
            await asyncio.sleep(0.1)
        time.sleep(0.1)
        connection = next(iter(state.connections))
        assert isinstance(connection, HttpConnection)
        connection.check_time(loop.time() + limits.header_seconds)
        await asyncio.sleep(0.1)
        listening.close()
        await listening.wait_closed()
        return registry.get_sample_value("open") or 0.0

    assert asyncio.run(close()) == 0


@pytest.mark.parametrize("size", [1 << 16, 5 << 20], ids=["64 KiB", "5 MiB"])
def test_headers_too_large_are_a_431_as_they_come(serve: Serve, size: int) -> None:
    with connected(serve().port) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nx: ")
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"y" * size)  # and no end
        told = answer(rest(connection))
    assert (told.status, told.error()["code"]) == (431, "headers_too_large")


def test_too_many_headers_are_a_431(served: Served) -> None:
    many = {f"x-{number}": "y" for number in range(10_000)}
    with connected(served.port) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request("GET", "/livez", None, **many))
        assert answer(rest(connection)).status == 431
    assert served.client.get("/livez").status_code == 200


BOTH = b"content-length: 5\r\ntransfer-encoding: chunked\r\n"
WRONG = {
    "length and chunks": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n" + BOTH + b"\r\n0\r\n\r\n",
    "two lengths": b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 4,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "a bare line feed": b"GET /livez HTTP/1.1\nhost: a\n\n",
    "a chunk's size": b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_request_is_a_400_and_the_end(served: Served, name: str) -> None:
    with connected(served.port) as connection:
        connection.sendall(WRONG[name])
        told = answer(rest(connection))
    assert (told.status, told.error()["code"]) == (400, "invalid_request")
    assert told.headers["connection"] == "close"
    assert served.engine.requests == []


def test_requests_in_one_packet_are_answered_in_order(served: Served) -> None:
    with connected(served.port) as connection:
        bad = b"GET /livez HTTP/1.1\r\n\r\n"
        connection.sendall(COMPLETION + request("GET", "/livez") + bad)
        said = rest(connection)
    assert [said.count(word) for word in (b"200 OK", b"400 Bad Request")] == [2, 1]
    order = [said.index(word) for word in (b"text_completion", b"alive", b"one Host header")]
    assert order == sorted(order)


def test_requests_without_end_in_one_packet_are_bounded(served: Served) -> None:
    with connected(served.port) as connection:
        connection.sendall(request("GET", "/livez") * 1000)
        said = rest(connection)
    assert 1 <= said.count(b"200 OK") <= 17
    assert said.count(b"400 Bad Request") == 1


def test_a_client_that_leaves_ends_every_request_that_it_sent(serve: Serve) -> None:
    served = serve(FakeEngine(hang=True))
    hanging = request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 5, "stream": True})
    with connected(served.port) as connection:
        connection.sendall(hanging * 2)
        while b"data: " not in connection.recv(1 << 16):
            pass
    for _ in range(1000):
        if not served.engine.running:
            break
        served.client.get("/livez")
    assert len(served.engine.aborted) == 1  # the second had not begun


def test_trailers_are_no_headers(serve: Serve) -> None:
    served = serve(**SMALL)
    chunks = b"%x\r\n%b\r\n0\r\nx-polyrex-timeout: soon\r\n\r\n"
    head = HEAD.replace(f"content-length: {len(BODY)}".encode(), b"transfer-encoding: chunked")
    with connected(served.port) as connection:
        connection.sendall(head + b"\r\n\r\n" + chunks % (len(BODY), BODY))
        told = answer(rest(connection))
    assert told.status == 200
    assert json.loads(told.body)["object"] == "text_completion"


def test_an_upgrade_is_answered_without_one(served: Served) -> None:
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c"}
    with connected(served.port) as connection:
        connection.sendall(request("GET", "/livez", None, **upgrade))
        told = answer(rest(connection))
    assert (told.status, told.headers["connection"]) == (200, "close")
