"""API keys: every route but two requires one, whatever the request looks like."""

from __future__ import annotations

import hashlib
import hmac
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.errors import StartError
from polyrex.server.http.auth import read_key_digests
from support.fake_server import FakeEngine, Served, serving

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def guarded(
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """A server that requires a key."""
    folder = tmp_path_factory.mktemp("tasks")
    digests = tuple(hashlib.sha256(key.encode()).digest() for key in KEYS)
    with serving(
        folder, random_inventory, tokenizer, FakeEngine(), api_key_digests=digests
    ) as running:
        yield running


def routes(served: Served) -> list[tuple[str, str]]:
    """Every method and path of the API, and some paths outside it."""
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    paths = served.client.get("/openapi.json", headers=headers).json()["paths"]
    return [
        *(
            (method, re.sub(r"\{\w+\}", "x", path))
            for path, methods in paths.items()
            for method in methods
        ),
        *(("GET", path) for path in ("/docs", "/redoc", "/openapi.json", "/nothing", "/")),
    ]


def test_every_route_but_the_open_ones_asks_for_a_key(guarded: Served) -> None:
    assert ("delete", "/v1/tasks/x") in routes(guarded)
    for method, path in routes(guarded):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Bearer"},
            {"authorization": "first-key"},
            {"authorization": "Basic first-key"},
            {"authorization": "Bearer first-key\tsecond-key"},
        ):
            response = guarded.client.request(method, path, headers=headers)
            expected = 200 if path in ("/livez", "/readyz") else 401
            assert response.status_code == expected, (method, path, headers)


def test_a_refusal_has_openais_shape(guarded: Served) -> None:
    error = guarded.client.get("/v1/models").json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize("key", KEYS)
def test_every_known_key_is_let_in(guarded: Served, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"}
    assert guarded.client.get("/v1/models", headers=headers).status_code == 200
    assert guarded.client.get("/metrics", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["x/livez?", "a/?x=", "evil/#", "x/readyz", "localhost"])
@pytest.mark.parametrize(
    "target", ["/v1/models", "/%76%31/models", "//v1/models", "/v1/models/", "/livez/../v1/models"]
)
def test_no_spelling_of_host_or_path_gets_round_the_key(
    guarded: Served, host: str, target: str
) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "TRACE"):
        request = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        address = (guarded.client.base_url.host, guarded.client.base_url.port or 0)
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(request.encode())
            status = connection.makefile("rb").readline().split()[1]
        assert status in (b"400", b"401")


def test_two_authorization_headers_are_refused(guarded: Served) -> None:
    headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer first-key")]
    assert guarded.client.get("/v1/models", headers=headers).status_code == 401


def test_without_a_key_file_only_what_looks_like_a_key_of_the_registry_must_be_one(
    served: Served,
) -> None:
    made = served.client.post("/v1/tenants/default/keys", json={"role": "metrics"}).json()
    status = {
        header: served.client.get("/v1/models", headers={"authorization": header}).status_code
        for header in (
            "Bearer sk-anything",
            "Basic anything",
            "Bearer",
            "Bearer plx_0123456789abcdef_no",
            "Bearer plx_",
            f"Bearer {made['key'][:-1]}",
            f"Bearer {made['key']}",
        )
    }
    assert list(status.values()) == [200, 200, 200, 401, 401, 401, 403]
    both = [("authorization", "Bearer sk-anything"), ("authorization", "Bearer sk-anything")]
    assert served.client.get("/v1/models", headers=both).status_code == 401


def test_a_key_of_the_registry_is_let_in_beside_those_of_the_file(guarded: Served) -> None:
    operator = {"authorization": f"Bearer {KEYS[1]}"}
    url = "/v1/tenants/default/keys"
    made = guarded.client.post(url, json={"role": "metrics"}, headers=operator).json()
    own = {"authorization": f"bearer {made['key']}"}
    assert guarded.client.get("/metrics", headers=own).status_code == 200
    assert guarded.client.get("/v1/models", headers=own).status_code == 403


@pytest.mark.parametrize("key", [*KEYS, "wrong-key"])
def test_every_key_of_the_file_is_compared_in_constant_time(
    guarded: Served, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    compared: list[tuple[int, int]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    response = guarded.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert response.status_code == (200 if key in KEYS else 401)
    # A key that is none of the file's may be one of the registry's.
    assert compared == [(32, 32)] * (len(KEYS) + (key not in KEYS))


def test_a_file_that_everybody_may_write_to_holds_no_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    (tmp_path / "keys").chmod(0o646)
    with pytest.raises(StartError, match=r"keys: every user may write to this file; chmod o-w"):
        read_key_digests(tmp_path / "keys")


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n\n  second-key \n")
    expected = tuple(hashlib.sha256(key.encode()).digest() for key in KEYS)
    assert read_key_digests(tmp_path / "keys") == expected


@pytest.mark.parametrize("content", ["", "\n \n", None])
def test_a_file_without_keys_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
    with pytest.raises(StartError, match="keys"):
        read_key_digests(tmp_path / "keys")
