"""Schemathesis over the OpenAPI document, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

from reliability.fuzz.planted import ODD_QUERY, UNDECLARED
from reliability.fuzz.schemas.run import schema
from reliability.fuzz.served import Served, serving
from support.reliability.small_base import SmallBase


def test_the_document_holds_and_nothing_is_a_server_error(
    fuzzed: Served, small_base: SmallBase, tmp_path: Path
) -> None:
    result = schema(fuzzed, small_base, tmp_path, cases=5000, examples=70)
    assert result.missed == [], result.remarks


def test_a_server_error_and_an_undeclared_status_are_found(
    small_base: SmallBase, tmp_path: Path
) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    with serving(small_base, folder, ODD_QUERY, UNDECLARED) as served:
        result = schema(served, small_base, tmp_path, cases=1000, examples=1)
    found = ["5xx and requests without an answer", "statuses that are not declared"]
    assert result.finds(found), result.figures
