"""The runner keeps what it has, goes on where it stopped, and fails where a proof does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reliability import run as runner
from reliability.catalogue import PROOFS
from reliability.ground import Ground
from reliability.proofs.borrowed import run_tests
from reliability.proofs.proof import Proof
from reliability.result import Result


def result(lost: float) -> Result:
    return Result("nothing is lost", "one try", {"lost": lost}, at_most={"lost": 0})


def proof(lost: float = 0, planted: float = 1) -> Proof:
    return Proof(lambda _: result(lost), lambda _: result(planted), "something is lost", ["lost"])


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
    assert entry["planted_defect"] == {
        "what": "something is lost",
        "caught": True,
        "finds": ["lost"],
    }
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


LIMITS = {"lost": 0, "old": 0, "errors": 0}


@pytest.mark.parametrize(
    ("finds", "figures", "caught"),
    [
        (["lost"], {"lost": 1, "old": 0, "errors": 0}, True),
        (["lost"], {"lost": 1, "old": 0, "errors": 1}, True),
        (["lost"], {"lost": 0, "old": 0, "errors": 1}, False),  # the run itself went wrong
        (["lost"], {"lost": 0, "old": 1, "errors": 0}, False),  # something else did
        (["lost", "old"], {"lost": 1, "old": 0, "errors": 0}, False),  # one limit sees nothing
        (["lost", "old"], {"lost": 1, "old": 1, "errors": 0}, True),
        ([], {"lost": 1, "old": 1, "errors": 1}, False),
    ],
)
def test_a_defect_is_caught_by_the_figures_that_it_must_move(
    ground: Ground, finds: list[str], figures: dict[str, float], caught: bool
) -> None:
    planted = Result("nothing is lost", "one try", figures, at_most=LIMITS)
    entry = runner.prove("x", Proof(lambda _: result(0), lambda _: planted, "any", finds), ground)
    assert entry["planted_defect"]["caught"] is caught
    assert entry["passed"] is caught


def test_a_defect_is_caught_by_the_test_that_must_fail(tmp_path: Path) -> None:
    """As the proofs that are tests already run them: a test that cannot even begin is another."""
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    found = run_tests(tmp_path, "some tests", [str(tmp_path / "test_some.py")], [], {})
    assert (found.figures["tests"], found.figures["errors"]) == (3, 1)
    assert found.failed_tests == ["test_fails"]
    assert found.finds(["test_fails"])
    assert not found.finds(["test_errs"])
    assert not found.finds(["test_passes"])


SOME_TESTS = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

def test_errs(broken): ...
def test_passes(): ...
def test_fails(): assert False
"""


def test_every_proof_names_what_its_defect_moves() -> None:
    vague = [name for name, each in PROOFS.items() if not each.finds or "errors" in each.finds]
    assert vague == []


def test_the_results_are_of_proofs_that_passed_and_caught_their_defects() -> None:
    entries = json.loads(runner.RESULTS.read_text())
    failed = [name for name, entry in entries.items() if not entry["passed"]]
    missed = [name for name, entry in entries.items() if not entry["planted_defect"]["caught"]]
    # those that are not there have not been run at full length yet: ROADMAP.md names them
    roadmap = (runner.RESULTS.parents[2] / "ROADMAP.md").read_text()
    assert [name for name in PROOFS if name not in entries and f"`{name}`" not in roadmap] == []
    assert [name for name in entries if name not in PROOFS] == []
    assert (failed, missed) == ([], [])


def test_the_table_beside_the_results_is_theirs() -> None:
    entries = json.loads(runner.RESULTS.read_text())
    written = runner.RESULTS.with_suffix(".md").read_text()
    assert written == runner.table(entries)
    assert [name for name in entries if f"`{name}`" not in written] == []


def test_a_run_goes_on_where_it_was_broken_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ground: Ground
) -> None:
    monkeypatch.setitem(PROOFS, "first", proof())
    monkeypatch.setitem(PROOFS, "second", Proof(break_off, break_off, "none", ["lost"]))
    out = tmp_path / "results.json"
    before = runner.run(["first", "second"], out, ground, again=False)
    kept = json.loads(out.read_text())
    monkeypatch.setitem(PROOFS, "first", Proof(break_off, break_off, "none", ["lost"]))
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
