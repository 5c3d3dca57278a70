"""ARCHITECTURE.md says what is there: its rooms, its files, and the functions of its two walks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
STEPS = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", TEXT, re.MULTILINE)


def defined(path: Path) -> set[str]:
    """The functions and methods of a file, `name` or `Class.name`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {
            prefix + member.name
            for member in members
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
        }
    return found


@pytest.mark.parametrize(("path", "function"), STEPS, ids=lambda value: value)
def test_every_step_of_a_walk_is_there(path: str, function: str) -> None:
    assert function in defined(ROOT / path)


def test_there_are_two_walks() -> None:
    walks = TEXT.split("## Walk ")[1:]
    assert len(walks) == 2
    assert len(STEPS) >= 20


def test_every_file_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:adapters|kernels|server|training|tests)/[\w./-]*)`", TEXT))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", TEXT))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_room_has_a_line() -> None:
    tree = TEXT.partition("```")[2].partition("```")[0]
    for folder in ("kernels", "adapters", "server", "training"):
        for room in sorted(path for path in (ROOT / folder).iterdir() if path.is_dir()):
            if list(room.rglob("*.py")):
                assert re.search(rf"\b{room.name}/", tree), room
