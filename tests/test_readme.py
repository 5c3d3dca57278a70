"""The README says what is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from polyrex.adapters.methods.registry import METHODS
from polyrex.server.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_method_has_a_row() -> None:
    rows = {
        name for line in README.splitlines() for name in re.findall(r"^\| `([a-z0-9-]+)`", line)
    }
    assert rows == set(METHODS)


def test_every_file_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:adapters|kernels|server|training|tests)/[\w./-]*)`", README))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_command_it_shows_is_there() -> None:
    shown = set(re.findall(r"\bpolyrex ([a-z-]+)", README)) & set(COMMANDS)
    assert shown == set(COMMANDS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_measured_figures_are_those_of_the_benchmark() -> None:
    ratios = json.loads((ROOT / "tests" / "results" / "bench.json").read_text())["ratios"]
    shown = dict(re.findall(r"^\| [^|]+ \| `([a-z0-9_]+)` \| ([\d.]+)", README, re.MULTILINE))
    assert {name: float(value) for name, value in shown.items()} == ratios
