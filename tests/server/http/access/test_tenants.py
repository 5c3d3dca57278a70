"""Tenants and their keys over HTTP, and what one tenant can learn of another."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.fake_server import Serve
from support.random_inventory import MakeRouter
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    bearer,
    client_of,
    make_key,
    make_tenant,
    revoke,
)
from support.tenants.isolation import ROUTES, guess_at_tasks

NO_LIMITS = {
    "tasks": None,
    "bytes": None,
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "concurrent": None,
    "weight": None,
}


@pytest.fixture
def operator(serve: Serve, tmp_path: Path) -> Iterator[httpx.Client]:
    """The server's administrator, with the key of the key file."""
    served = serve(api_key_digests=OPERATOR_DIGESTS, lora_dir=tmp_path)
    with client_of(served.url, OPERATOR_KEY) as client:
        yield client


def test_a_tenant_is_made_shown_and_listed(operator: httpx.Client) -> None:
    made = operator.post("/v1/tenants", json={"name": "acme", "quotas": {"tasks": 5}})
    assert made.status_code == 201
    shown = made.json()
    assert shown == operator.get("/v1/tenants/acme").json()
    assert shown.pop("created") > 0
    quotas = NO_LIMITS | {"tasks": 5}
    assert shown == {"name": "acme", "object": "tenant", "quotas": quotas, "disabled": False}
    assert operator.post("/v1/tenants", json={"name": "acme"}).status_code == 409
    names = [tenant["name"] for tenant in operator.get("/v1/tenants").json()["data"]]
    assert names == ["acme", "default"]


def test_tenants_are_listed_in_pages(operator: httpx.Client) -> None:
    for name in ("a", "b", "c"):
        make_tenant(operator, name)
    first = operator.get("/v1/tenants", params={"limit": 2}).json()
    rest = operator.get("/v1/tenants", params={"limit": 2, "after": "b"}).json()
    assert ([each["name"] for each in first["data"]], first["has_more"]) == (["a", "b"], True)
    assert ([each["name"] for each in rest["data"]], rest["has_more"]) == (["c", "default"], False)


def test_a_change_of_quotas_leaves_the_others(operator: httpx.Client) -> None:
    make_tenant(operator, "acme", tasks=5, concurrent=2)
    changed = operator.patch("/v1/tenants/acme", json={"quotas": {"tasks": None, "bytes": 9}})
    assert changed.json()["quotas"] == NO_LIMITS | {"bytes": 9, "concurrent": 2}
    assert operator.patch("/v1/tenants/acme", json={}).json() == changed.json()


WRONG: dict[str, tuple[str, str, Any, int]] = {
    "name": ("POST", "/v1/tenants", {"name": "No Such"}, 400),
    "quota": ("POST", "/v1/tenants", {"name": "a", "quotas": {"tasks": -1}}, 400),
    "unknown quota": ("POST", "/v1/tenants", {"name": "a", "quotas": {"cats": 1}}, 400),
    "unknown field": ("POST", "/v1/tenants", {"name": "a", "colour": "red"}, 400),
    "disabled default": ("PATCH", "/v1/tenants/default", {"disabled": True}, 400),
    "tenant": ("PATCH", "/v1/tenants/nobody", {"disabled": True}, 404),
    "tenant shown": ("GET", "/v1/tenants/nobody", None, 404),
    "role": ("POST", "/v1/tenants/default/keys", {"role": "god"}, 400),
    "no role": ("POST", "/v1/tenants/default/keys", {}, 400),
    "expiry": ("POST", "/v1/tenants/default/keys", {"role": "metrics", "expires_in": 0}, 400),
    "label": ("POST", "/v1/tenants/default/keys", {"role": "metrics", "label": "a\nb"}, 400),
    "keys of nobody": ("GET", "/v1/tenants/nobody/keys", None, 404),
    "key for nobody": ("POST", "/v1/tenants/nobody/keys", {"role": "metrics"}, 404),
    "key": ("DELETE", "/v1/keys/nothing", None, 404),
    "rotated key": ("POST", "/v1/keys/nothing/rotate", {}, 404),
    "grace": ("POST", "/v1/keys/nothing/rotate", {"grace": -1}, 400),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused(operator: httpx.Client, wrong: str) -> None:
    method, path, body, status = WRONG[wrong]
    response = operator.request(method, path, json=body)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_new_key_is_shown_once_and_works_at_once(operator: httpx.Client) -> None:
    make_tenant(operator, "acme")
    made = operator.post(
        "/v1/tenants/acme/keys", json={"role": "inference", "label": "app", "expires_in": 60}
    )
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    shown = made.json()
    key = shown.pop("key")
    assert operator.get("/v1/tenants/acme/keys").json()["data"] == [shown]
    assert (shown["tenant"], shown["role"], shown["label"]) == ("acme", "inference", "app")
    assert shown["expires"] > shown["created"]
    assert key not in operator.get("/v1/tenants/acme/keys").text
    assert operator.get("/v1/models", headers=bearer(key)).status_code == 200


def test_a_revoked_key_is_refused_by_the_next_request(operator: httpx.Client) -> None:
    key = make_key(operator, "default", "inference")
    assert operator.get("/v1/models", headers=bearer(key)).status_code == 200
    revoke(operator, key)
    assert operator.get("/v1/models", headers=bearer(key)).status_code == 401
    assert operator.get("/v1/tenants/default/keys").json()["data"][0]["revoked"] is not None


def test_a_rotated_key_gives_way_to_a_new_one(operator: httpx.Client) -> None:
    old = make_key(operator, "default", "task-admin")
    key_id = old.split("_")[1]
    rotated = operator.post(f"/v1/keys/{key_id}/rotate", json={"grace": 600})
    new = rotated.json()["key"]
    status = [operator.get("/v1/tasks", headers=bearer(key)).status_code for key in (old, new)]
    assert (rotated.status_code, status) == (201, [200, 200])
    operator.post(f"/v1/keys/{key_id}/rotate", json={})
    status = [operator.get("/v1/tasks", headers=bearer(key)).status_code for key in (old, new)]
    assert status == [401, 200]


def test_a_disabled_tenants_keys_are_refused(operator: httpx.Client) -> None:
    make_tenant(operator, "acme")
    key = make_key(operator, "acme", "inference")
    assert operator.patch("/v1/tenants/acme", json={"disabled": True}).json()["disabled"]
    assert operator.get("/v1/models", headers=bearer(key)).status_code == 401
    operator.patch("/v1/tenants/acme", json={"disabled": False})
    assert operator.get("/v1/models", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("role", ["inference", "task-admin", "server-admin", "metrics"])
def test_everybody_can_ask_who_he_is(operator: httpx.Client, role: str) -> None:
    make_tenant(operator, "acme", tasks=3)
    key = make_key(operator, "acme", role)
    assert operator.get("/v1/whoami", headers=bearer(key)).json() == {
        "tenant": "acme",
        "role": role,
        "key": key.split("_")[1],
        "quotas": NO_LIMITS | {"tasks": 3},
    }
    own = operator.get("/v1/whoami").json()
    assert (own["tenant"], own["role"], own["key"]) == ("default", "server-admin", "file:1")


def test_nobody_learns_of_another_tenants_tasks(
    operator: httpx.Client, make_router: MakeRouter, tmp_path: Path
) -> None:
    found = guess_at_tasks(operator, tmp_path, (make_router(1), make_router(2)), guesses=1000)
    assert found.asked == 1000
    assert {route: len(answers) for route, answers in found.answers.items()} == dict.fromkeys(
        ROUTES, 1
    )
    assert {status for answers in found.answers.values() for status, _ in answers} == {404}
    by_task = {body for each in found.answers.values() for _, body in each}
    assert len(by_task) == 3  # of tasks, of models where the field says so, and vLLM's
    assert found.leaks == []
    assert found.before == found.after != [[], []]


def test_keys_are_in_no_log_error_or_metric(
    operator: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        key = make_key(operator, "default", "metrics")
        answers = [
            operator.get(path, headers=bearer(key)).text
            for path in ("/v1/models", "/nothing", "/v1/whoami", "/metrics", f"/v1/keys/{key[:20]}")
        ]
        wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
        answers.append(operator.get("/v1/models", headers=bearer(wrong)).text)
    secret = key.split("_", 2)[2]
    assert len(answers) == 6
    assert not any(secret[:-1] in text for text in (*answers, caplog.text))
