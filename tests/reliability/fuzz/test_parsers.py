"""Coverage-guided fuzzing of parsers, at the length of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from reliability.fuzz.parsing.run import parsers
from reliability.fuzz.parsing.targets import TARGETS, guarded, seeds
from support.reliability.small_base import SmallBase


def test_only_declared_errors_come_out_of_parsers(small_base: SmallBase, tmp_path: Path) -> None:
    result = parsers(small_base, tmp_path, executions=50_000)
    assert result.missed == [], result.remarks


@pytest.mark.parametrize("name", ["body", "router"])
def test_an_error_that_is_not_declared_is_found(
    small_base: SmallBase, tmp_path: Path, name: str
) -> None:
    result = parsers(small_base, tmp_path, executions=50_000, targets=[name], planted=True)
    assert result.finds(["errors that are not declared"]), result.figures
    crash = next(path for path in tmp_path.iterdir() if path.name.startswith(f"{name}-crash"))
    assert b"\x7f" in crash.read_bytes()


def test_a_run_goes_on_where_it_was_broken_off(small_base: SmallBase, tmp_path: Path) -> None:
    first = parsers(small_base, tmp_path, executions=2000, targets=["name"])
    corpus = len(list((tmp_path / "name").iterdir()))
    whole = parsers(small_base, tmp_path, executions=5000, targets=["name"])
    assert first.figures["inputs"] == 2000
    assert whole.figures["inputs"] == 5000
    assert (tmp_path / "name.json").read_text() == "5000"
    assert len(list((tmp_path / "name").iterdir())) >= corpus


@pytest.mark.parametrize("name", TARGETS)
def test_the_inputs_to_begin_with_are_understood(small_base: SmallBase, name: str) -> None:
    target = TARGETS[name](small_base.base.parent)
    first = seeds(name, small_base.base.parent)
    understood = 0
    for seed in first:
        guarded(target)(seed)
        try:
            target(seed)
        except Exception:
            continue
        understood += 1
    assert understood > 0
