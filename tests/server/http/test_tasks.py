"""Tasks over HTTP: registered, listed, shown, replaced, dropped, and selected by requests."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
from safetensors.torch import save

from polyrex.adapters.files.inventory import Inventory
from support.fake_server import FakeEngine, Serve, Served

if TYPE_CHECKING:
    from support.random_inventory import MakeRouter

BINARY = {"content-type": "application/octet-stream"}


def add(served: Served, name: str, router: bytes) -> httpx.Response:
    return served.client.post("/v1/tasks", params={"name": name}, content=router, headers=BINARY)


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


def test_tasks_survive_a_restart(serve: Serve, make_router: MakeRouter) -> None:
    task = add(serve(), "one", make_router(1)).json()
    assert serve().client.get("/v1/tasks/one").json() == task


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


def test_a_task_whose_file_is_damaged_is_500_and_others_go_on(
    served: Served, make_router: MakeRouter
) -> None:
    add(served, "one", make_router(1))
    add(served, "two", make_router(2))
    (path,) = served.tasks_folder.glob("one@*")
    path.write_bytes(b"damaged")
    response = served.complete(task="one")
    assert response.status_code == 500
    assert str(path) not in response.text
    assert served.complete(task="two").status_code == 200
