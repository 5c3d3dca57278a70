"""The runner keeps what it has, goes on where it stopped, and fails where a proof does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reliability import run as runner
from reliability.catalogue import PROOFS, Proof
from reliability.ground import Ground
from reliability.result import Result


def result(lost: float) -> Result:
    return Result("nothing is lost", "one try", {"lost": lost}, at_most={"lost": 0})


def proof(lost: float = 0, planted: float = 1) -> Proof:
    return Proof(lambda _: result(lost), lambda _: result(planted), "something is lost")


def break_off(_: Ground) -> Result:
    raise RuntimeError("broken off")


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def test_a_result_is_written_with_its_limit_and_its_planted_defect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ground: Ground
) -> None:
    monkeypatch.setitem(PROOFS, "whole", proof())
    out = tmp_path / "results.json"
    failed = runner.run(["whole"], out, ground, again=False)
    entry = json.loads(out.read_text())["whole"]
    assert failed == []
    assert entry["figure"] == {"lost": 0}
    assert entry["limit"] == {"lost": "<= 0"}
    assert entry["passed"] is True
    assert entry["planted_defect"] == {"what": "something is lost", "caught": True}
    assert entry["command"] == "make reliability ARGS='--only whole'"


@pytest.mark.parametrize("wrong", [proof(lost=1), proof(planted=0)], ids=["fails", "sees nothing"])
def test_a_proof_that_fails_or_misses_its_defect_has_not_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ground: Ground, wrong: Proof
) -> None:
    monkeypatch.setitem(PROOFS, "wrong", wrong)
    out = tmp_path / "results.json"
    failed = runner.run(["wrong"], out, ground, again=False)
    assert failed == ["wrong"]
    assert json.loads(out.read_text())["wrong"]["passed"] is False


def test_a_run_goes_on_where_it_was_broken_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ground: Ground
) -> None:
    monkeypatch.setitem(PROOFS, "first", proof())
    monkeypatch.setitem(PROOFS, "second", Proof(break_off, break_off, "none"))
    out = tmp_path / "results.json"
    before = runner.run(["first", "second"], out, ground, again=False)
    kept = json.loads(out.read_text())
    monkeypatch.setitem(PROOFS, "first", Proof(break_off, break_off, "none"))
    monkeypatch.setitem(PROOFS, "second", proof())
    after = runner.run(["first", "second"], out, ground, again=False)
    both = json.loads(out.read_text())
    again = runner.run(["first"], out, ground, again=True)
    assert before == ["second"]
    assert list(kept) == ["first"]
    assert after == []
    assert both["first"] == kept["first"]
    assert again == ["first"]


def test_an_unknown_proof_is_refused() -> None:
    with pytest.raises(Exception, match="no proof nothing"):
        runner.names_of("nothing,updates")
    assert runner.names_of("updates") == ["updates"]
