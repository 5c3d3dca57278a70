"""GET /, the way in for somebody who only has the server's address."""

from __future__ import annotations

from importlib.metadata import version

from support.fake_server import Served


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
