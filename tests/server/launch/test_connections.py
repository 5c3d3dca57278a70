"""How many connections a server takes, and who is answered once it has them all."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from support.fake_server import Serve
from support.reliability.fork_server import Forked, ForkServer
from support.reliability.small_base import SmallBase
from support.sockets.raw import PATIENCE, Answer, answer, connected, request, rest

DESCRIPTORS = 64


def ask(port: int, path: str, address: str = "127.0.0.1") -> Answer:
    """Ask once, on a connection of its own."""
    with connected(port, address=address) as connection:
        connection.sendall(request("GET", path, None, connection="close"))
        return answer(rest(connection))


def statuses(port: int, address: str = "127.0.0.1") -> list[int]:
    """What the health routes and another one answer."""
    return [ask(port, path, address).status for path in ("/livez", "/readyz", "/v1/models")]


def test_beyond_the_most_connections_only_the_health_is_told(serve: Serve) -> None:
    served = serve(max_connections=8)
    served.client.close()
    with ExitStack() as opened:
        for _ in range(8):
            opened.enter_context(connected(served.port))
        assert statuses(served.port) == [200, 200, 503]
        refused = ask(served.port, "/v1/models")
        assert refused.error()["code"] == "too_many_connections"
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    for _ in range(1000):
        if statuses(served.port) == [200, 200, 200]:
            break
    assert statuses(served.port) == [200, 200, 200]


def test_an_address_has_a_limit_of_its_own(serve: Serve) -> None:
    served = serve(max_address_connections=4)
    with ExitStack() as opened:
        for _ in range(4):
            opened.enter_context(connected(served.port, address="127.0.0.2"))
        assert statuses(served.port, "127.0.0.2") == [200, 200, 503]
        assert statuses(served.port) == [200, 200, 200]


def test_silent_connections_beyond_the_limit_make_room_for_newer_ones(serve: Serve) -> None:
    served = serve(max_connections=4, header_seconds=PATIENCE)
    served.client.close()
    with ExitStack() as opened:
        first = [opened.enter_context(connected(served.port)) for _ in range(4)]
        later = [opened.enter_context(connected(served.port)) for _ in range(200)]
        assert statuses(served.port) == [200, 200, 503]
        assert [rest(connection) for connection in later] == [b""] * 200
        for connection in first:  # which were within the limit
            connection.sendall(request("GET", "/livez", None, connection="close"))
        assert [answer(rest(connection)).status for connection in first] == [200] * 4


@pytest.fixture(scope="module")
def few_descriptors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """A server that may have 64 descriptors, and started with a lower limit than that."""
    folder = tmp_path_factory.mktemp("descriptors")
    small = SmallBase.write(folder)
    with ForkServer(small, folder) as servers:
        url = f"sqlite:///{folder}/registry.db"
        with servers.serving(url, engine="echo") as first:
            parent = psutil.Process(first.pid).ppid()
        resource.prlimit(parent, resource.RLIMIT_NOFILE, (DESCRIPTORS - 16, DESCRIPTORS))
        with servers.serving(url, engine="echo") as server:
            yield server


def test_a_server_with_few_descriptors_answers_through_a_flood(few_descriptors: Forked) -> None:
    soft, hard = resource.prlimit(few_descriptors.pid, resource.RLIMIT_NOFILE)
    assert (soft, hard) == (DESCRIPTORS, DESCRIPTORS)
    port = few_descriptors.port
    with ExitStack() as opened:
        flood = [opened.enter_context(connected(port)) for _ in range(200)]
        for _ in range(20):
            assert statuses(port)[:2] == [200, 200]
        for connection in flood:
            connection.sendall(request("GET", "/livez"))
    for _ in range(1000):
        if statuses(port) == [200, 200, 200]:
            break
    assert statuses(port) == [200, 200, 200]
    output = Path(few_descriptors.output).read_text()
    assert "descriptors are free" in output
    assert "Too many open files" not in output
