"""Every route, method, identity and spelling of path and Host: exactly as the table declares."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.config import ServerConfig
from polyrex.server.errors import StartError
from polyrex.server.http.access import ACCESS, Rule, access_table, check_declared
from polyrex.server.http.auth import Guard
from polyrex.server.registry.database import Database
from polyrex.server.registry.principal import Role
from polyrex.server.registry.tenants.directory import Directory
from support.fake_server import FakeEngine, Served, serving
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    client_of,
    make_key,
    make_tenant,
    revoke,
)

DOCS = Path(__file__).parents[4] / "docs" / "tenants.md"
ROUTES = sorted(ACCESS)
HOSTS = (
    "localhost",
    "x/livez?",
    "a/?x=",
    "evil/#",
    "x/readyz",
    "evil.example",
    "user@127.0.0.1:1",
    "",
)


@dataclass(frozen=True)
class Guarded:
    """A server that asks for keys, and somebody of every kind who asks it."""

    served: Served
    roles: dict[str, Role | None]  # None: nobody that the server knows
    keys: dict[str, str]


@pytest.fixture(scope="module")
def guarded(
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("tasks")
    with (
        serving(
            folder,
            random_inventory,
            tokenizer,
            FakeEngine(),
            api_key_digests=OPERATOR_DIGESTS,
        ) as served,
        client_of(served.url, OPERATOR_KEY) as operator,
    ):
        make_tenant(operator, "acme")
        make_tenant(operator, "rival")
        roles: dict[str, Role | None] = {role.value: role for role in Role}
        keys = {role.value: make_key(operator, "acme", role.value) for role in Role}
        roles |= {"key file": Role.server_admin, "other tenant": Role.task_admin}
        keys |= {
            "key file": OPERATOR_KEY,
            "other tenant": make_key(operator, "rival", "task-admin"),
            "revoked": make_key(operator, "acme", "server-admin"),
            "wrong": "plx_0123456789abcdef_" + "x" * 43,
        }
        roles |= {"nobody": None, "revoked": None, "wrong": None}
        revoke(operator, keys["revoked"])
        yield Guarded(served, roles, keys)


def address(served: Served) -> tuple[str, int]:
    return served.client.base_url.host, served.client.base_url.port or 0


def ask(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    key: str | None = None,
    host: str = "localhost",
) -> tuple[int, bytes]:
    """Send a request as it is spelt here, without a body, and return what it is answered."""
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    connection.putheader("Host", host)
    if key is not None:
        connection.putheader("Authorization", f"Bearer {key}")
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    response = connection.getresponse()
    return response.status, response.read()


def open_path(path: str) -> str:
    """A path of a route, its parameters filled with a name that nothing has."""
    return re.sub(r"\{\w+\}", "nothing", path)


def unknown_forms(path: str) -> dict[str, str]:
    """Spellings that look like a path to somebody, and are none of its route."""
    if path == "/":
        return {"doubled": "//"}
    return {
        "doubled": f"/{path}",
        "trailing": f"{path}/",
        "case": path.swapcase(),
        "dots": f"/livez/..{path}",
    }


def known_forms(path: str) -> dict[str, str]:
    """Spellings that the server reads as the path itself."""
    encoded = "".join(f"%{ord(letter):02x}" if letter != "/" else "/" for letter in path)
    return {
        "plain": path,
        "encoded": encoded,
        "encoded slashes": "/" + path[1:].replace("/", "%2F"),
        "query": f"{path}?path=/livez",
    }


def declared(rule: Rule, role: Role | None) -> str:
    if rule.open or (role is not None and role in rule.roles):
        return "let through"
    return "unknown" if role is None else "forbidden"


NO_PAGE = "not_found"
SHARE = ("PUT", "/v1/tasks/{name}/shared_with/{tenant}")


def own_statuses(method: str, path: str) -> set[int]:
    """What a route itself answers to a request without a body, about something that is not there.

    A page that is not there at all is another 404: it has another code.
    """
    if method in ("GET", "DELETE") or (method, path) == SHARE:
        return {404 if "{" in path else 200}
    return {400, 415}  # the body is missing, or is none of JSON


def outcome(route: tuple[str, str], status: int, body: bytes) -> str:
    """What an answer means; anything that the route would not say itself is shown as it is."""
    if status in (401, 403):
        return "unknown" if status == 401 else "forbidden"
    no_page = status == 404 and json.loads(body)["error"]["code"] == NO_PAGE
    if status not in own_statuses(*route) or no_page:
        return f"{status} {body!r:.200}"
    return "let through"


def test_every_identity_gets_from_every_route_what_the_table_says(guarded: Guarded) -> None:
    found, expected = {}, {}
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        for number, (route, who) in enumerate(product(ROUTES, guarded.roles)):
            forms = known_forms(open_path(route[1]))
            cases = [("plain", host) for host in HOSTS]
            cases += [(name, HOSTS[number % len(HOSTS)]) for name in forms if name != "plain"]
            for name, host in cases:
                key = guarded.keys.get(who)
                answer = ask(connection, route[0], forms[name], key, host)
                found[route, who, name, host] = outcome(route, *answer)
                expected[route, who, name, host] = declared(ACCESS[route], guarded.roles[who])
    assert len(found) == (len(HOSTS) + 3) * len(ROUTES) * len(guarded.roles)
    assert found == expected


def test_no_spelling_of_a_path_is_another_route(guarded: Guarded) -> None:
    found, expected = {}, {}
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        for (method, path), who in product(ROUTES, guarded.roles):
            for name, form in unknown_forms(open_path(path)).items():
                case = (method, path, who, name)
                found[case], _ = ask(connection, method, form, guarded.keys.get(who))
                expected[case] = 401 if guarded.roles[who] is None else 404
    assert found == expected


def test_no_host_and_no_method_gets_anybody_in_without_a_key(guarded: Guarded) -> None:
    found = set()
    paths = {path for _, path in ROUTES if not ACCESS.get(("GET", path), Rule()).open}
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        for path, host in product(sorted(paths), HOSTS):
            for method in ("GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "PATCH", "DELETE"):
                found.add(ask(connection, method, open_path(path), None, host)[0])
        for method in ("HEAD", "OPTIONS", "TRACE", "POST"):
            found.add(ask(connection, method, "/livez")[0])
    assert found == {401}


def test_a_method_that_no_route_has_is_answered_by_none(guarded: Guarded) -> None:
    """Whoever asks, however the path is spelt. HEAD is as GET on the pages that FastAPI makes."""
    pages = {"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
    found, expected = {}, {}
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        for path, who in product(sorted({path for _, path in ROUTES}), guarded.roles):
            role = guarded.roles[who]
            for method, (name, form) in product(
                ("HEAD", "TRACE", "PROPFIND"), known_forms(open_path(path)).items()
            ):
                case = (method, path, who, name)
                found[case], _ = ask(connection, method, form, guarded.keys.get(who))
                if role is None:
                    expected[case] = 401
                elif method == "HEAD" and path in pages:
                    expected[case] = 200 if role in ACCESS["GET", path].roles else 403
                else:
                    expected[case] = 405
    assert found == expected


def test_options_tell_nothing_to_nobody_and_change_nothing(guarded: Guarded) -> None:
    found: dict[bool, set[int]] = {True: set(), False: set()}
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        for path, who in product(sorted({path for _, path in ROUTES}), guarded.roles):
            for form in known_forms(open_path(path)).values():
                status, body = ask(connection, "OPTIONS", form, guarded.keys.get(who))
                found[guarded.roles[who] is None].add(status)
                assert len(body) < 200
    assert found[True] == {401}
    assert found[False] <= {200, 204, 405}


def test_who_is_not_let_in_learns_neither_what_is_here_nor_why(guarded: Guarded) -> None:
    """One answer to no key, a wrong one and a revoked one, without version, server or key."""
    told = set()
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        for path, who in product(("/", "/v1/models", "/nothing", "/docs"), guarded.roles):
            if guarded.roles[who] is None:
                key = guarded.keys.get(who, "")
                connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
                response = connection.getresponse()
                body = response.read()
                headers = {name.lower(): value for name, value in response.getheaders()}
                assert not headers.keys() & {"server", "x-powered-by", "via"}
                told.add((response.status, body))
                text = f"{headers} {body!r}"
                assert version("polyrex") not in text
                assert not key or key[-20:] not in text
    assert len(told) == 1
    assert told.pop()[0] == 401


def test_the_health_routes_have_no_banner_either(guarded: Guarded) -> None:
    for path, word in (("/livez", "alive"), ("/readyz", "ready")):
        answer = httpx.get(f"{guarded.served.url}{path}", trust_env=False)
        assert answer.json() == {"status": word}
        assert "server" not in answer.headers
        assert version("polyrex") not in f"{answer.headers} {answer.text}"


def test_the_role_is_checked_before_the_body_is_read(guarded: Guarded) -> None:
    size = 64 << 20  # more than the server would read
    with closing(http.client.HTTPConnection(*address(guarded.served), timeout=30)) as connection:
        connection.putrequest("PUT", "/v1/tasks/x")
        connection.putheader("Authorization", f"Bearer {guarded.keys['inference']}")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()  # and no body follows
        assert connection.getresponse().status == 403


def test_every_route_of_the_application_is_in_the_table_and_no_other(guarded: Guarded) -> None:
    with client_of(guarded.served.url, OPERATOR_KEY) as operator:
        paths = operator.get("/openapi.json").json()["paths"]
    documented = {(method.upper(), path) for path in paths for method in paths[path]}
    documented |= {
        ("GET", path) for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
    }
    assert documented == set(ACCESS)


def test_a_route_that_the_table_does_not_have_keeps_the_server_from_starting() -> None:
    app = FastAPI()
    app.add_api_route("/v1/models", lambda: None, methods=["GET"])
    check_declared(app.routes)
    app.add_api_route("/v1/models", lambda: None, methods=["DELETE"])
    with pytest.raises(StartError, match="DELETE /v1/models"):
        check_declared(app.routes)
    app = FastAPI()
    app.mount("/files", Response())
    with pytest.raises(StartError, match="/files"):
        check_declared(app.routes)


def test_the_docs_show_the_table() -> None:
    assert f"\n\n{access_table()}\n\n" in DOCS.read_text()


def test_websockets_are_refused(tmp_path: Path) -> None:
    sent: list[Message] = []

    async def send_message(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def accept(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    with closing(Database(f"sqlite:///{tmp_path / 'registry.db'}")) as database:
        guard = Guard(accept, ServerConfig(), Directory(database))
        scope = {"type": "websocket", "path": "/livez"}
        asyncio.run(guard(scope, receive, send_message))
    assert [message["type"] for message in sent] == ["websocket.close"]
