"""Tasks over HTTP: registered, listed, shown, replaced, dropped, and selected by requests."""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory
from polyrex.server.http import app
from support.fake_server import FakeEngine, Serve, Served, serving

from .test_faults import eventually

if TYPE_CHECKING:
    from support.random_inventory import MakeRouter

BINARY = {"content-type": "application/octet-stream"}


def add(served: Served, name: str, router: bytes) -> httpx.Response:
    return served.client.post("/v1/tasks", params={"name": name}, content=router, headers=BINARY)


def tenant(served: Served, name: str) -> httpx.Client:
    """A new tenant: a client with its key."""
    served.client.post("/v1/tenants", json={"name": name}).raise_for_status()
    made = served.client.post(f"/v1/tenants/{name}/keys", json={"role": "task-admin"})
    headers = {"Authorization": f"Bearer {made.json()['key']}"}
    return httpx.Client(base_url=served.url, headers=headers, timeout=30, trust_env=False)


def test_a_task_is_registered_from_its_files_bytes(served: Served, make_router: MakeRouter) -> None:
    response = add(served, "one", make_router(1, description="first"))
    assert response.status_code == 201
    task = response.json()
    assert (task["name"], task["version"], task["description"]) == ("one", 1, "first")
    assert served.client.get("/v1/tasks/one").json() == task


def test_a_task_is_registered_from_json(served: Served, make_router: MakeRouter) -> None:
    body = {"name": "one", "router": base64.b64encode(make_router(1)).decode()}
    assert served.client.post("/v1/tasks", json=body).status_code == 201


def test_the_same_router_again_is_200_and_another_409(
    served: Served, make_router: MakeRouter
) -> None:
    add(served, "one", make_router(1))
    assert add(served, "one", make_router(1)).status_code == 200
    assert add(served, "one", make_router(2)).status_code == 409


def test_put_makes_a_new_version(served: Served, make_router: MakeRouter) -> None:
    add(served, "one", make_router(1))
    path = "/v1/tasks/one"
    assert served.client.put(path, content=make_router(2), headers=BINARY).status_code == 200
    assert served.client.get(path).json()["version"] == 2
    body = {"router": base64.b64encode(make_router(3)).decode()}
    assert served.client.put("/v1/tasks/two", json=body).status_code == 201


def test_a_dropped_task_is_gone(served: Served, make_router: MakeRouter) -> None:
    add(served, "one", make_router(1))
    assert served.client.delete("/v1/tasks/one").json()["deleted"] is True
    assert served.client.get("/v1/tasks/one").status_code == 404
    assert served.client.delete("/v1/tasks/one").status_code == 404
    assert served.complete(task="one").status_code == 404


def test_tasks_survive_a_restart(
    tmp_path: Path,
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    make_router: MakeRouter,
) -> None:
    with serving(tmp_path, random_inventory, tokenizer, FakeEngine()) as served:
        task = add(served, "one", make_router(1)).json()
    with serving(tmp_path, random_inventory, tokenizer, FakeEngine()) as served:
        assert served.client.get("/v1/tasks/one").json() == task


def test_tasks_are_listed_in_pages(served: Served, make_router: MakeRouter) -> None:
    for index in range(5):
        add(served, f"task-{index}", make_router(index))
    page = served.client.get("/v1/tasks", params={"limit": 2, "after": "task-0"}).json()
    assert [task["name"] for task in page["data"]] == ["task-1", "task-2"]
    assert page["has_more"] is True
    last = served.client.get("/v1/tasks", params={"limit": 2, "after": "task-2"}).json()
    assert last["has_more"] is False


def test_models_are_the_base_and_every_task(served: Served, make_router: MakeRouter) -> None:
    add(served, "one", make_router(1))
    base, task = served.client.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == ("base", None)
    assert (task["id"], task["parent"], task["root"]) == ("one", "base", "base")
    assert served.client.get("/v1/models/one").json() == task
    assert served.client.get("/v1/models/base").json() == base
    assert served.client.get("/v1/models/other").status_code == 404


@pytest.mark.parametrize(
    "fields", [{"task": "one"}, {"model": "one"}, {"model": "base", "task": "one"}]
)
def test_task_or_model_selects_the_router(
    served: Served, make_router: MakeRouter, fields: dict[str, str]
) -> None:
    sha256 = add(served, "one", make_router(1)).json()["router_sha256"]
    response = served.complete(**fields)
    pinned = served.engine.requests[0].task
    assert pinned is not None
    assert pinned.info.router_sha256 == sha256
    assert response.headers["x-polyrex-task-version"] == "one@1"
    assert response.json()["system_fingerprint"] == f"one@1:{sha256[:12]}"


def test_no_task_is_the_base_model(served: Served, make_router: MakeRouter) -> None:
    add(served, "one", make_router(1))
    response = served.complete(model="base")
    assert served.engine.requests[0].task is None
    assert "x-polyrex-task-version" not in response.headers


@pytest.mark.parametrize("name", ["", "UPPER", "-x", "a b", "../x", "x" * 65, "é", "base"])
def test_a_name_that_cannot_be_a_tasks_is_400(
    served: Served, make_router: MakeRouter, name: str
) -> None:
    assert add(served, name, make_router(1)).status_code == 400
    assert served.client.get("/v1/tasks").json()["data"] == []


def test_a_bad_router_is_422_with_tensor_and_shape(
    served: Served, make_router: MakeRouter, random_inventory: Inventory
) -> None:
    good = make_router(1)
    size = int.from_bytes(good[:8], "little")
    metadata = json.loads(good[8 : 8 + size])["__metadata__"]
    response = add(served, "one", save({"routing": torch.zeros(3, 8)}, metadata))
    assert response.status_code == 422
    message = response.json()["error"]["message"]
    assert "routing" in message
    assert "[3, 8]" in message
    assert "[210, 8]" in message
    assert served.complete().status_code == 200


@pytest.mark.parametrize("router", [b"", b"PK\x03\x04", b"\x80\x04pickle", b"\xff" * 100])
def test_what_is_no_router_is_422(served: Served, router: bytes) -> None:
    assert add(served, "one", router).status_code == 422
    assert served.client.get("/v1/tasks").json()["data"] == []


def test_a_router_for_another_inventory_is_409(
    served: Served, make_router: MakeRouter, random_inventory: Inventory
) -> None:
    other = make_router(1).replace(random_inventory.sha256.encode(), b"0" * 64)
    response = add(served, "one", other)
    assert response.status_code == 409
    assert random_inventory.sha256 in response.json()["error"]["message"]


def test_an_oversized_router_is_413(serve: Serve) -> None:
    served = serve(FakeEngine(), max_body_bytes=1000)
    assert add(served, "one", b"x" * 2000).status_code == 413
    assert served.complete().status_code == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "one", "router": "not base64!"}, "router"),
        ({"name": "one"}, "router"),
        ({"name": "one", "router": "", "path": "/etc/passwd"}, "path"),
        ({"name": 3, "router": ""}, "name"),
    ],
)
def test_a_bad_field_of_a_task_is_400(served: Served, body: dict[str, object], field: str) -> None:
    response = served.client.post("/v1/tasks", json=body)
    assert response.status_code == 400
    assert field in response.json()["error"]["message"]


def test_a_body_of_another_type_is_415(served: Served, make_router: MakeRouter) -> None:
    headers = {"content-type": "text/plain"}
    for method, path in (("POST", "/v1/tasks?name=one"), ("PUT", "/v1/tasks/one")):
        response = served.client.request(method, path, content=make_router(1), headers=headers)
        assert response.status_code == 415


def test_a_task_whose_bytes_are_damaged_is_500_until_it_is_registered_again(
    served: Served, make_router: MakeRouter
) -> None:
    sha256 = add(served, "one", make_router(1)).json()["router_sha256"]
    add(served, "two", make_router(2))
    with closing(sqlite3.connect(served.tasks_folder / "registry.db")) as database:
        damaged = "UPDATE routers SET data = x'00' WHERE sha256 = ?"
        database.execute(damaged, (bytes.fromhex(sha256),))
        database.commit()
    response = served.complete(task="one")
    assert response.status_code == 500
    assert str(served.tasks_folder) not in response.text
    assert served.complete(task="two").status_code == 200
    assert add(served, "one", make_router(1)).status_code == 200
    assert served.complete(task="one").status_code == 200


def test_a_task_is_shown_with_everything_known_of_it(
    served: Served, make_router: MakeRouter
) -> None:
    router = make_router(1, description="first", provenance={"instruction": "Do it."})
    add(served, "one", router)
    served.client.put("/v1/tasks/one/labels", json={"team": "search"})
    task = served.client.get("/v1/tasks/one").json()
    assert isinstance(task.pop("created"), int)
    assert task == {
        "name": "one",
        "object": "task",
        "version": 1,
        "router_sha256": hashlib.sha256(router).hexdigest(),
        "size_bytes": len(router),
        "description": "first",
        "provenance": {"instruction": "Do it."},
        "scores": {},
        "template": "Do it.",
        "servable": True,
        "tenant": "default",
        "current_version": 1,
        "last_version": 1,
        "labels": {"team": "search"},
        "aliases": {},
        "canary": None,
        "shared_with": [],
        "deleted": None,
    }


def test_labels_come_with_a_task_and_are_replaced(served: Served, make_router: MakeRouter) -> None:
    router = make_router(1)
    query = {"name": "one", "label": ["team=search", "env=a=b"]}
    made = served.client.post("/v1/tasks", params=query, content=router, headers=BINARY).json()
    assert made["labels"] == {"team": "search", "env": "a=b"}
    encoded = base64.b64encode(make_router(2)).decode()
    changed = served.client.put("/v1/tasks/one", json={"router": encoded, "labels": {"team": "x"}})
    assert (changed.json()["version"], changed.json()["labels"]) == (2, {"team": "x"})
    assert served.client.put("/v1/tasks/one", json={"router": encoded}).json()["labels"] == {
        "team": "x"
    }
    assert served.client.put("/v1/tasks/one/labels", json={}).json()["labels"] == {}


@pytest.mark.parametrize("label", ["team", "Team=a", "=a", "a" * 64 + "=b", "a=" + "b" * 257])
def test_a_label_that_is_none_is_400(served: Served, make_router: MakeRouter, label: str) -> None:
    query = {"name": "one", "label": label}
    response = served.client.post("/v1/tasks", params=query, content=make_router(1), headers=BINARY)
    assert response.status_code == 400
    assert served.client.get("/v1/tasks", params={"label": label}).status_code == 400


def test_tasks_are_searched_by_text_and_labels(served: Served, make_router: MakeRouter) -> None:
    for seed, (name, text) in enumerate({"one": "First", "two": "Second", "three": "100%"}.items()):
        add(served, name, make_router(seed, description=text))
    served.client.put("/v1/tasks/one/labels", json={"team": "a", "env": "x"})
    served.client.put("/v1/tasks/two/labels", json={"team": "a", "env": "y"})

    def found(*query: tuple[str, str]) -> list[str]:
        page = served.client.get("/v1/tasks", params=httpx.QueryParams(query)).json()
        return [task["name"] for task in page["data"]]

    assert found(("q", "FIRST")) == ["one"]
    assert found(("q", "t")) == ["one", "three", "two"]
    assert found(("q", "0%")) == ["three"]
    assert found(("q", "%")) == ["three"]
    assert found(("q", "_")) == []
    assert found(("label", "team=a")) == ["one", "two"]
    assert found(("label", "team=a"), ("label", "env=y")) == ["two"]
    assert found(("label", "team=b")) == []


def test_a_dropped_task_is_listed_apart_and_comes_back(
    served: Served, make_router: MakeRouter
) -> None:
    before = add(served, "one", make_router(1)).json()
    served.client.delete("/v1/tasks/one")
    assert served.client.get("/v1/tasks").json()["data"] == []
    (dropped,) = served.client.get("/v1/tasks", params={"deleted": "true"}).json()["data"]
    assert dropped["deleted"] is not None
    assert dropped | {"deleted": None} == before
    assert served.client.post("/v1/tasks/one/undelete", json={}).json() == before
    assert served.complete(task="one").status_code == 200
    assert served.client.get("/v1/tasks", params={"deleted": "true"}).json()["data"] == []


def age(folder: Path, name: str) -> None:
    """Let a task have been dropped long ago."""
    with closing(sqlite3.connect(folder / "registry.db")) as database:
        database.execute("UPDATE tasks SET deleted = 1 WHERE name = ?", (name,))
        database.commit()


def dropped(served: Served) -> list[str]:
    page = served.client.get("/v1/tasks", params={"deleted": "true"}).json()
    return [task["name"] for task in page["data"]]


def test_what_was_dropped_long_ago_is_purged_again_and_again(
    serve: Serve, make_router: MakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_PURGE_SECONDS", 0.05)
    served = serve()
    for name in ("first", "second", "third"):
        add(served, name, make_router(1))
        served.client.delete(f"/v1/tasks/{name}")
    age(served.tasks_folder, "first")
    eventually(lambda: "first" not in dropped(served))
    age(served.tasks_folder, "second")  # no purge has seen it yet
    eventually(lambda: "second" not in dropped(served))
    assert dropped(served) == ["third"]


def test_what_was_dropped_long_ago_is_purged_at_the_start(
    tmp_path: Path,
    random_inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    make_router: MakeRouter,
) -> None:
    with serving(tmp_path, random_inventory, tokenizer, FakeEngine()) as served:
        for name in ("long-ago", "lately"):
            add(served, name, make_router(1))
            served.client.delete(f"/v1/tasks/{name}")
    age(tmp_path, "long-ago")
    with serving(tmp_path, random_inventory, tokenizer, FakeEngine()) as served:
        eventually(lambda: len(dropped(served)) == 1)
        assert dropped(served) == ["lately"]
        assert served.client.post("/v1/tasks/long-ago/undelete", json={}).status_code == 404
        assert add(served, "long-ago", make_router(1)).json()["version"] == 2


def test_a_browser_cannot_be_made_to_change_a_task(served: Served, make_router: MakeRouter) -> None:
    """A page on another site may send GET and POST of text, without being asked about it."""
    task = add(served, "one", make_router(1)).json()
    for method, path in (
        ("POST", "/v1/tasks/one/undelete"),
        ("POST", "/v1/tasks/one/rollback"),
        ("PUT", "/v1/tasks/one/labels"),
        ("PUT", "/v1/tasks/one/aliases/prod"),
        ("PUT", "/v1/tasks/one/canary"),
        ("PUT", "/v1/tasks/one/shared_with/other"),
        ("DELETE", "/v1/tasks/one"),
        ("DELETE", "/v1/tasks/one/canary"),
    ):
        plain = {"content-type": "text/plain"}
        response = served.client.request(method, path, content=b"{}", headers=plain)
        assert response.status_code == 415, (method, path)
    assert served.client.post("/v1/tasks/one/undelete").status_code == 415
    assert served.client.get("/v1/tasks/one").json() == task


def test_a_shared_task_is_another_tenants_to_use_and_not_to_change(
    served: Served, make_router: MakeRouter
) -> None:
    add(served, "one", make_router(1))
    add(served, "two", make_router(2))
    guest = tenant(served, "guest")
    assert served.client.put("/v1/tasks/one/shared_with/guest").json()["shared_with"] == ["guest"]
    tenant(served, "third")
    served.client.put("/v1/tasks/one/shared_with/third")
    seen = guest.get("/v1/tasks/default:one")
    assert seen.json()["shared_with"] == ["guest"]
    ids = [model["id"] for model in guest.get("/v1/models").json()["data"]]
    assert ids == ["base", "default:one"]
    assert guest.get("/v1/tasks").json()["data"] == []
    asked = {"prompt": "Hello", "task": "default:one"}
    assert guest.post("/v1/completions", json=asked).status_code == 200
    unknown = guest.get("/v1/tasks/default:none")
    assert unknown.status_code == 404
    for path in ("one", "default:two", "two", "default:one@2", "default:one@prod"):
        assert guest.get(f"/v1/tasks/{path}").content == unknown.content
    assert guest.delete("/v1/tasks/default:one").content == unknown.content
    assert guest.put("/v1/tasks/default:one/shared_with/guest").content == unknown.content
    served.client.delete("/v1/tasks/one/shared_with/guest")
    assert guest.get("/v1/tasks/default:one").content == unknown.content
    assert guest.post("/v1/completions", json=asked).status_code == 404
    guest.close()
