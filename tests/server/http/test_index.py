"""Routes for operators: the way in, and what health and metrics say of the registry."""

from __future__ import annotations

import sqlite3
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import Connection, event
from sqlalchemy.exc import OperationalError

from support.fake_server import Served

if TYPE_CHECKING:
    from support.random_inventory import MakeRouter


def put(served: Served, name: str, data: bytes) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    return served.client.put(f"/v1/tasks/{name}", content=data, headers=headers)


def metrics(served: Served) -> dict[str, float]:
    """The figures of /metrics, by name and labels."""
    lines = served.client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def test_the_index_names_the_server_and_leads_on(served: Served) -> None:
    response = served.client.get("/")
    assert response.status_code == 200
    index = response.json()
    assert (index.pop("name"), index.pop("version")) == ("polyrex", version("polyrex"))
    assert index == {
        "docs": "/docs",
        "tasks": "/v1/tasks",
        "models": "/v1/models",
        "metrics": "/metrics",
        "health": "/readyz",
    }
    for path in index.values():
        assert served.client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        ("SQLITE_IOERR_FSYNC", 503, "storage_error", "1"),
        ("SQLITE_FULL", 507, "storage_full", None),  # nobody knows when there is room again
    ],
)
def test_server_whose_database_fails_is_degraded_and_goes_on_answering(
    served: Served,
    make_router: MakeRouter,
    failure: str,
    status: int,
    code: str,
    retry_after: str | None,
) -> None:
    def fail_to_commit(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.rollback()  # as SQLite does by itself where a COMMIT fails
        error = sqlite3.OperationalError("secret detail")
        error.sqlite_errorname = failure
        raise OperationalError("COMMIT", {}, error)

    assert put(served, "plural", make_router(0)).status_code == 201
    assert served.client.get("/readyz").json() == {"status": "ready"}
    assert metrics(served)["polyrex_registry_degraded"] == 0
    engine = served.registry.database.engine
    event.listen(engine, "commit", fail_to_commit)
    refused = put(served, "another", make_router(0))
    event.remove(engine, "commit", fail_to_commit)
    assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
    assert refused.headers.get("retry-after") == retry_after
    assert "secret detail" not in refused.text
    degraded = served.client.get("/readyz")
    assert degraded.status_code == 200
    assert degraded.json() == {"status": "degraded"}  # anybody may ask; the log says why
    assert metrics(served)["polyrex_registry_degraded"] == 1
    assert served.complete(task="plural").status_code == 200
    assert served.complete(task="another").status_code == 404
    assert put(served, "another", make_router(0)).status_code == 201
    assert served.client.get("/readyz").json() == {"status": "ready"}


def test_metrics_count_canaries_without_naming_their_tasks(
    served: Served, make_router: MakeRouter
) -> None:
    for seed in range(2):
        assert put(served, "plural", make_router(seed)).is_success
    canary = served.client.put("/v1/tasks/plural/canary", json={"version": 1, "share": 1.0})
    assert canary.is_success
    for _ in range(3):
        assert served.complete(task="plural").headers["x-polyrex-task-version"] == "plural@1"
    found = metrics(served)
    assert (found["polyrex_tasks"], found["polyrex_registry_revision"]) == (1, 3)
    assert found['polyrex_canary_requests_total{version="canary"}'] == 3
    assert found['polyrex_canary_requests_total{version="current"}'] == 0
    naming = {name for name in found if "plural" in name}
    assert {name.partition("{")[0].rpartition("_")[0] for name in naming} <= {
        "polyrex_task_requests",
        "polyrex_task_errors",
        "polyrex_task_tokens",
    }
