"""Rows and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyrex.adapters.errors import DataError
from polyrex.adapters.rows import Row
from polyrex.training.data.tasks import load_tasks, prompt_of

SHIPPED_ROWS = Path(__file__).parents[3] / "training" / "rows"


def test_prompt_lists_up_to_seven_options() -> None:
    seven = tuple("abcdefg")
    assert prompt_of("Do.", Row("x", "a", seven)) == "Do.\nx\nOptions: a; b; c; d; e; f; g\nAnswer:"
    assert prompt_of("Do.", Row("x", "a", (*seven, "h"))) == "Do.\nx\nAnswer:"
    assert prompt_of("Do.", Row("x", "a", None)) == "Do.\nx\nAnswer:"


def test_shipped_rows_are_those_of_the_manifest() -> None:
    manifest = json.loads((SHIPPED_ROWS / "manifest.json").read_text())
    counts = {entry["task"]: entry["rows"] for entry in manifest["tasks"]}
    tasks = load_tasks(SHIPPED_ROWS)
    assert {t.name: {k: len(v) for k, v in t.rows.items()} for t in tasks} == counts
    assert "canary GUID" in manifest["canary"]


def test_role_and_names_select_tasks(rows_folder: Path) -> None:
    assert [t.name for t in load_tasks(rows_folder, role="held_in")] == ["colour", "shout"]
    assert [t.name for t in load_tasks(rows_folder, ("other_colour",))] == ["other_colour"]


def test_unknown_task_names_those_there_are(rows_folder: Path) -> None:
    with pytest.raises(DataError, match="no task color; it has colour, shout, other_colour"):
        load_tasks(rows_folder, ("color",))


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_tasks(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"colour\.jsonl:1: not a row"),
        ('{"split": "train", "input": "a"}', r"colour\.jsonl:1: `answer` is missing"),
        (
            '{"split": "train", "input": 1, "answer": "a"}',
            "`input` must be text, got 1",
        ),
        (
            '{"split": "train", "input": "i", "answer": "a", "options": ["b"]}',
            "answer 'a' is not among its options",
        ),
        ('{"split": "dev", "input": "i", "answer": "a"}', "split 'dev', expected train, valid"),
    ],
)
def test_bad_row_is_named_with_its_line(
    rows_folder: Path, tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "manifest.json").write_text((rows_folder / "manifest.json").read_text())
    (tmp_path / "tasks" / "colour.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        load_tasks(tmp_path, ("colour",))
