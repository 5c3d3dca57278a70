"""Whose requests a server takes that lets everybody in: this machine's, and no web page's."""

from __future__ import annotations

import http.client
from contextlib import closing

import httpx
import pytest

from support.fake_server import Serve, Served

from .test_access import ROUTES, address, ask, open_path

LOOPBACK = ("localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:80")
ELSEWHERE = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil.example/localhost",
    "localhost@evil.example",
    "localhost:80@evil.example",
    "localhost:",
    "[::1].evil.example",
    "",
)


def test_without_keys_only_names_of_this_machine_are_answered(served: Served) -> None:
    def status_of(host: str, path: str) -> int:
        with closing(http.client.HTTPConnection(*address(served), timeout=30)) as connection:
            return ask(connection, "GET", path, None, host)[0]

    assert {host: status_of(host, "/v1/models") for host in LOOPBACK} == dict.fromkeys(
        LOOPBACK, 200
    )
    assert {host: status_of(host, "/v1/models") for host in ELSEWHERE} == dict.fromkeys(
        ELSEWHERE, 400
    )
    assert {status_of(host, "/livez") for host in ELSEWHERE} == {200}  # health checks use addresses


def test_allowed_hosts_are_answered_and_no_others(serve: Serve) -> None:
    served = serve(allowed_hosts=("API.example",))
    for host, status in (("api.example:443", 200), ("localhost", 400), ("x.api.example", 400)):
        response = served.client.get("/v1/models", headers={"host": host})
        assert response.status_code == status, host
    refused = served.client.get("/v1/models", headers={"host": "evil.example"}).json()["error"]
    assert "evil.example" in refused["message"]
    assert "--allowed-hosts" in refused["message"]


FOREIGN = (
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_page_of_another_origin_can_change_nothing_without_a_key(
    served: Served, headers: dict[str, str]
) -> None:
    status = {}
    for method, path in ROUTES:
        if method != "GET":
            answer = served.client.request(
                method,
                open_path(path),
                headers={"content-type": "text/plain", **headers},
                content=b"{}",
            )
            status[method, path] = answer.status_code
    assert set(status.values()) == {403}


def test_the_servers_own_pages_and_programs_are_of_no_other_origin(served: Served) -> None:
    own: tuple[dict[str, str], ...] = (
        {},
        {"origin": str(served.client.base_url).rstrip("/")},
        {"sec-fetch-site": "same-origin", "origin": str(served.client.base_url).rstrip("/")},
        {"sec-fetch-site": "none"},
    )
    body = {"prompt": "x", "max_tokens": 1}
    for headers in own:
        answer: httpx.Response = served.client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, headers
