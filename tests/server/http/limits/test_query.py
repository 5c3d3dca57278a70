"""A parameter of the query that comes twice."""

from __future__ import annotations

import pytest

from support.fake_server import Serve


@pytest.mark.parametrize("query", ["after=a&after=b", "limit=3&limit=3", "%61fter=a&after="])
def test_which_one_is_meant_is_not_guessed(serve: Serve, query: str) -> None:
    refused = serve().client.get(f"/v1/models?{query}")
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, query.replace("%61", "a").split("=")[0])


def test_labels_may_be_several(serve: Serve) -> None:
    assert serve().client.get("/v1/tasks?label=a=b&label=c=d").status_code == 200
