"""vLLM's routes for adapters that come and go while a server runs, over the registry of tasks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from polyrex.server.requests.lora_folder import read_below
from support.fake_server import Serve, Served
from support.random_inventory import MakeRouter
from support.tenants.identities import (
    OPERATOR_DIGESTS,
    OPERATOR_KEY,
    client_of,
    make_key,
    make_tenant,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of --lora-dir."""
    made = tmp_path / "loras"
    made.mkdir()
    return made


@pytest.fixture
def served(serve: Serve, folder: Path) -> Served:
    return serve(lora_dir=folder)


def load(served: Served, name: str, path: object, **fields: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return served.client.post("/v1/load_lora_adapter", json=body)


def vllm_error(message: str, kind: str, status: int) -> object:
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def test_a_router_is_loaded_used_and_unloaded(
    served: Served, folder: Path, make_router: MakeRouter
) -> None:
    (folder / "step-1.safetensors").write_bytes(make_router(1))
    response = load(served, "policy", "step-1.safetensors")
    assert (response.status_code, response.text) == (
        200,
        "Success: LoRA adapter 'policy' added successfully.",
    )
    assert "content-type" not in response.headers
    assert served.complete(model="policy").headers["x-polyrex-task-version"] == "policy@1"
    assert "policy" in served.client.get("/v1/models").text
    body = {"lora_name": "policy", "lora_int_id": 7}
    gone = served.client.post("/v1/unload_lora_adapter", json=body)
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'policy' removed successfully.",
    )
    assert served.complete(model="policy").status_code == 404
    again = served.client.post("/v1/unload_lora_adapter", json=body)
    assert again.status_code == 404
    assert again.json() == vllm_error(
        "The lora adapter 'policy' cannot be found.", "NotFoundError", 404
    )


def test_a_folder_stands_for_its_router_and_a_path_may_be_absolute(
    served: Served, folder: Path, make_router: MakeRouter
) -> None:
    (folder / "run" / "step-2").mkdir(parents=True)
    (folder / "run" / "step-2" / "router.safetensors").write_bytes(make_router(2))
    (folder / "latest").symlink_to(folder / "run" / "step-2")
    assert load(served, "one", "run/step-2").status_code == 200
    assert load(served, "two", folder / "run" / "step-2").status_code == 200
    assert load(served, "three", "latest").status_code == 200
    assert load(served, "four", "latest/router.safetensors").status_code == 200


def test_a_name_is_loaded_again_in_place_only(
    served: Served, folder: Path, make_router: MakeRouter
) -> None:
    for step in (1, 2):
        (folder / f"step-{step}").write_bytes(make_router(step))
    load(served, "policy", "step-1")
    for path in ("step-1", "step-2"):
        taken = load(served, "policy", path)
        assert taken.status_code == 400
        assert taken.json() == vllm_error(
            "The lora adapter 'policy' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True.",
            "InvalidUserInput",
            400,
        )
    assert served.complete(task="policy").headers["x-polyrex-task-version"] == "policy@1"
    assert load(served, "policy", "step-2", load_inplace=True).status_code == 200
    assert served.complete(task="policy").headers["x-polyrex-task-version"] == "policy@2"
    assert served.complete(task="policy@1").headers["x-polyrex-task-version"] == "policy@1"


def test_the_old_version_stays_where_the_new_one_cannot_be_loaded(
    served: Served, folder: Path, make_router: MakeRouter
) -> None:
    (folder / "good").write_bytes(make_router(1))
    (folder / "torn").write_bytes(make_router(2)[:-1])
    (folder / "long").write_bytes(make_router(2) + b"x" * 100_000)
    load(served, "policy", "good")
    for path in ("torn", "long"):
        assert load(served, "policy", path, load_inplace=True).status_code == 422
    assert load(served, "policy", "missing", load_inplace=True).status_code == 404
    assert served.complete(task="policy").headers["x-polyrex-task-version"] == "policy@1"
    assert len(served.client.get("/v1/tasks/policy/versions").json()["data"]) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_name": "", "lora_path": "a"}, "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "a", "lora_path": ""}, "Both 'lora_name' and 'lora_path' must be provided."),
        (
            {"lora_name": "base", "lora_path": "a"},
            "The lora adapter 'base' conflicts with a served base model.",
        ),
        (
            {"lora_name": "default:base", "lora_path": "a"},
            "The lora adapter 'default:base' conflicts with a served base model.",
        ),
    ],
)
def test_what_vllm_refuses_is_refused_in_its_words(
    served: Served, fields: dict[str, str], message: str
) -> None:
    response = served.client.post("/v1/load_lora_adapter", json=fields)
    assert response.status_code == 400
    assert response.json() == vllm_error(message, "InvalidUserInput", 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"is_3d_lora_weight": True},
        {"lora_rank": 8},
        {"load_inplace": "yes"},
        {"lora_path": ["a"]},
    ],
)
def test_a_field_that_cannot_be_heeded_is_400(served: Served, fields: dict[str, object]) -> None:
    assert load(served, "one", "a", **fields).status_code == 400


def test_other_content_types_are_415(served: Served) -> None:
    for path in ("load_lora_adapter", "unload_lora_adapter"):
        response = served.client.post(
            f"/v1/{path}", content=b'{"lora_name": "a"}', headers={"content-type": "text/plain"}
        )
        assert response.status_code == 415


def test_without_the_flag_both_routes_are_forbidden(serve: Serve, folder: Path) -> None:
    served = serve()
    for path, body in (
        ("load_lora_adapter", {"lora_name": "one", "lora_path": str(folder)}),
        ("unload_lora_adapter", {"lora_name": "one"}),
    ):
        response = served.client.post(f"/v1/{path}", json=body)
        assert response.status_code == 403
        assert "--lora-dir" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["acme:policy", "acme:policy@1", "acme:policy@prod"])
def test_a_tenant_can_neither_load_nor_unload_what_is_anothers(
    serve: Serve, folder: Path, make_router: MakeRouter, name: str
) -> None:
    for place in (folder, folder / "rival"):
        place.mkdir(exist_ok=True)
        (place / "router.safetensors").write_bytes(make_router(2))
    served = serve(lora_dir=folder, api_key_digests=OPERATOR_DIGESTS)
    with client_of(served.url, OPERATOR_KEY) as operator:
        for tenant in ("acme", "rival"):
            make_tenant(operator, tenant)
        binary = {"content-type": "application/octet-stream"}
        operator.put("/v1/tasks/acme:policy", content=make_router(1), headers=binary)
        operator.put("/v1/tasks/acme:policy/aliases/prod", json={"version": 1})
        before = operator.get("/v1/tasks/acme:policy").raise_for_status().json()
        with client_of(served.url, make_key(operator, "rival", "task-admin")) as rival:
            for path, fields in (
                ("load", {"lora_path": "router.safetensors"}),
                ("load", {"lora_path": "router.safetensors", "load_inplace": True}),
                ("unload", {}),
            ):
                found, absent = (
                    rival.post(f"/v1/{path}_lora_adapter", json={"lora_name": asked, **fields})
                    for asked in (name, "nobody:nothing")
                )
                assert (found.status_code, absent.status_code) == (404, 404)
                assert found.text.replace(name, "NAME") == absent.text.replace(
                    "nobody:nothing", "NAME"
                )
            assert rival.get("/v1/tasks").json()["data"] == []
        assert operator.get("/v1/tasks/acme:policy").json() == before


@pytest.mark.parametrize("name", ["If-Match", "If-None-Match", "Idempotency-Key"])
def test_a_condition_is_400_and_nothing_happens(
    served: Served, folder: Path, make_router: MakeRouter, name: str
) -> None:
    (folder / "good").write_bytes(make_router(1))
    for path, body in (
        ("load_lora_adapter", {"lora_name": "two", "lora_path": "good"}),
        ("unload_lora_adapter", {"lora_name": "one"}),
    ):
        load(served, "one", "good")
        response = served.client.post(f"/v1/{path}", json=body, headers={name: "*"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
    assert [task["name"] for task in served.client.get("/v1/tasks").json()["data"]] == ["one"]


def test_a_tenant_loads_from_its_own_folder_alone(
    served: Served, folder: Path, make_router: MakeRouter
) -> None:
    operator = served.client
    for number, tenant in enumerate(("acme", "rival")):
        make_tenant(operator, tenant)
        (folder / tenant).mkdir()
        (folder / tenant / f"{tenant}-1").write_bytes(make_router(number))
    (folder / "mine").write_bytes(make_router(3))
    (folder / "rival" / "link").symlink_to(folder / "acme" / "acme-1")
    with client_of(served.url, make_key(operator, "rival", "task-admin")) as rival:
        as_rival = replace(served, client=rival)
        assert load(as_rival, "one", "rival-1").status_code == 200
        assert load(as_rival, "two", folder / "rival" / "rival-1").status_code == 200
        missing = load(as_rival, "three", "nothing-of-this-name")
        assert missing.status_code == 404
        acmes = folder / "acme" / "acme-1"
        for path in ("../acme/acme-1", "acme/acme-1", acmes, "link", "../mine", folder / "mine"):
            response = load(as_rival, "three", path)
            assert (response.status_code, response.content) == (404, missing.content), path
    assert load(served, "one", "mine").status_code == 200
    assert load(served, "two", "acme/acme-1").status_code == 200


def test_a_tenant_without_a_folder_finds_nothing(
    served: Served, folder: Path, make_router: MakeRouter
) -> None:
    make_tenant(served.client, "acme")
    (folder / "good").write_bytes(make_router(1))
    with client_of(served.url, make_key(served.client, "acme", "task-admin")) as acme:
        response = load(replace(served, client=acme), "one", "good")
    assert response.status_code == 404
    assert response.json() == vllm_error(
        "Loading lora one failed: No adapter found for the lora_path below --lora-dir",
        "NotFoundError",
        404,
    )


Attack = Callable[[Path, Path], object]
ATTACKS: dict[str, Attack] = {
    "absolute": lambda _, secret: secret,
    "up": lambda folder, secret: f"../{secret.parent.name}/{secret.name}",
    "up from below": lambda folder, secret: f"run/../../{secret.parent.name}/{secret.name}",
    "a link": lambda folder, _: "link",
    "a folder that is a link": lambda folder, secret: f"linked/{secret.name}",
    "a folder whose router is a link": lambda folder, _: "inside",
    "the folder itself": lambda folder, _: folder,
    "its name as a beginning": lambda folder, _: f"{folder}-not/router.safetensors",
    "missing": lambda *_: "missing",
    "a pipe": lambda *_: "pipe",
    "a device": lambda *_: "/dev/zero",
    "a process's memory": lambda *_: "/proc/self/mem",
    "NUL": lambda *_: "a\0b",
    "too long": lambda *_: "x" * 5000,
    "a circle of links": lambda *_: "circle",
    "below a file": lambda *_: "good/router.safetensors",
    "a URL": lambda *_: "https://example.org/router.safetensors",
    "home": lambda *_: "~/router.safetensors",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_path_outside_the_folder_is_as_if_there_were_no_file(
    served: Served, folder: Path, tmp_path: Path, make_router: MakeRouter, attack: Attack
) -> None:
    """Every file outside is a good router: whichever is loaded, is loaded by mistake."""
    outside = tmp_path / "outside"
    for other in (outside, tmp_path / "loras-not", folder / "run", folder / "inside"):
        other.mkdir()
    for other in (outside, tmp_path / "loras-not"):
        (other / "router.safetensors").write_bytes(make_router(1))
    (folder / "good").write_bytes(make_router(1))
    (folder / "link").symlink_to(outside / "router.safetensors")
    (folder / "linked").symlink_to(outside)
    (folder / "inside" / "router.safetensors").symlink_to(outside / "router.safetensors")
    (folder / "circle").symlink_to(folder / "circle")
    os.mkfifo(folder / "pipe")
    response = load(served, "one", attack(folder, outside / "router.safetensors"))
    assert response.status_code == 404
    missing = load(served, "one", "nothing-of-this-name")
    assert response.content == missing.content
    assert str(tmp_path) not in response.text
    assert served.client.get("/v1/tasks").json()["data"] == []


@pytest.mark.parametrize("path", ["link", "linked/router.safetensors"])
def test_a_link_made_after_the_path_was_resolved_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "router.safetensors").write_bytes(b"secret")
    (folder / "link").symlink_to(outside / "router.safetensors")
    (folder / "linked").symlink_to(outside)
    (folder / "file").write_bytes(b"open")
    # As if the links had been plain files and folders when their paths were resolved.
    monkeypatch.setattr(os.path, "realpath", lambda found, *, strict: os.path.normpath(found))
    assert read_below(folder, "file", 100) == b"open"
    assert read_below(folder, path, 100) is None
