"""The harness compares neighbouring turns and reports the result."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench.harness import Turns, command_line, machine, report, without


def test_ratio_is_over_the_nearest_turns() -> None:
    rates = {"base": {0: 10.0, 2: 20.0, 5: 40.0}, "ours": {1: 15.0, 3: 30.0, 6: 10.0}}
    turns = Turns(rates, 7)
    # over 15, the mean of 10 and 20; over 30, of 20 and 40; over 40, the last
    assert turns.compare("ours", "base") == (1.0, (0.625, 1.0))
    rates["ours"] = {6: 10.0}
    assert turns.compare("ours", "base") == (0.25, (0.25, 0.25))
    assert turns.medians() == {"base": 20.0, "ours": 10.0}


def drifting(order: str) -> Turns:
    """Turns of b, and of a at twice its rate, on a machine that loses 3 % of its speed a turn."""
    turns = Turns()
    for number, name in enumerate(order):
        turns.add(name, {"a": 200, "b": 100}[name] * 0.97**number)
    return turns


def test_drift_cancels_between_neighbours_and_between_nothing_else() -> None:
    expected = pytest.approx(2, rel=0.02)
    assert drifting("ab" * 10).compare("a", "b").ratio == expected
    assert drifting("ba" * 10).compare("a", "b").ratio == expected
    assert drifting("a" * 10 + "b" * 10).compare("a", "b").ratio != expected


def test_swapped_turns_are_told_apart() -> None:
    expected = pytest.approx(2, rel=0.02)
    turns = drifting("ab" * 10)
    assert turns.compare("b", "a").ratio != expected
    swapped = Turns({"a": turns.figures["b"], "b": turns.figures["a"]}, turns.turn)
    assert swapped.compare("a", "b").ratio != expected
    assert swapped.compare("b", "a").ratio == expected


def test_figures_of_warm_up_rounds_are_dropped() -> None:
    turns = Turns()
    for number, into in enumerate(turns.rounds(3, warm_up=2)):
        into.add("a", number)
    assert turns.figures == {"a": {0: 2, 1: 3, 2: 4}}


def test_document_is_written_indented_and_printed_on_the_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = {"ratio": 0.5, "machine": machine(), "by_task": {"a": 1}}
    out = tmp_path / "folder" / "result.json"
    report(document, out)
    assert json.loads(out.read_text()) == document
    assert "\n  " in out.read_text()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    report(document, None, without(document, "by_task"))
    assert json.loads(capsys.readouterr().out) == {"ratio": 0.5, "machine": machine()}


def test_rounds_are_an_option_only_of_benchmarks_that_have_rounds() -> None:
    assert command_line("", rounds=7).parse_args([]) == argparse.Namespace(rounds=7, out=None)
    assert command_line("").parse_args([]) == argparse.Namespace(out=None)
