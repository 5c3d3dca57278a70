"""A data folder, which holds a manifest and a file of rows for each task; and the prompts of rows.

`manifest.json` lists the tasks (`task`, `role`, `instruction`, `metric`, ...); `tasks/NAME.jsonl`
has a row on each line (adapters/rows.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from polyrex.adapters.errors import DataError
from polyrex.adapters.rows import Row, read_rows

Split = Literal["train", "valid", "test"]
Metric = Literal["rank_classification_accuracy", "exact_match"]

MOST_OPTIONS_IN_PROMPT = 7


@dataclass(frozen=True)
class Task:
    """A task: its rows by split, its instruction and its metric."""

    name: str
    instruction: str
    metric: Metric
    role: str
    group: str
    source: str
    rows: dict[Split, tuple[Row, ...]]


def prompt_of(instruction: str, row: Row) -> str:
    """The prompt of a row: the instruction, the input, the options if there are at most 7, and
    `Answer:`. The answer follows after one space."""
    lines = [instruction, row.input]
    if row.options and len(row.options) <= MOST_OPTIONS_IN_PROMPT:
        lines.append("Options: " + "; ".join(row.options))
    return "\n".join([*lines, "Answer:"])


def example_prompt(task: Task) -> str:
    """A prompt to try the task with: that of its first test row, or else of its first train row."""
    rows = task.rows["test"] or task.rows["train"]
    return prompt_of(task.instruction, rows[0])


def load_tasks(
    folder: Path, names: Sequence[str] | None = None, role: str | None = None
) -> list[Task]:
    """The tasks of a data folder in the order of its manifest, or those of the names or the role.

    Raises DataError naming the file and line for a missing manifest, an unknown task or a bad row.
    """
    manifest = folder / "manifest.json"
    try:
        entries = {e["task"]: e for e in json.loads(manifest.read_text())["tasks"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest}: not a readable manifest: {error!r}") from error
    unknown = sorted(set(names or ()) - set(entries))
    if unknown:
        raise DataError(f"{manifest}: no task {', '.join(unknown)}; it has {', '.join(entries)}")
    chosen = [
        entry
        for name, entry in entries.items()
        if (names is None or name in names) and (role is None or entry.get("role") == role)
    ]
    if not chosen:
        raise DataError(f"{manifest}: no task of role {role!r}")
    return [_load_task(folder, entry) for entry in chosen]


def _load_task(folder: Path, entry: dict[str, Any]) -> Task:
    path = folder / "tasks" / f"{entry['task']}.jsonl"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if entry.get("metric") not in get_args(Metric):
        expected = " or ".join(get_args(Metric))
        raise DataError(f"{entry['task']}: metric {entry.get('metric')!r}, expected {expected}")
    rows: dict[Split, list[Row]] = {split: [] for split in get_args(Split)}
    for number, row in enumerate(read_rows(lines, str(path)), start=1):
        if row.split not in get_args(Split):
            raise DataError(f"{path}:{number}: split {row.split!r}, expected {', '.join(rows)}")
        rows[cast(Split, row.split)].append(row)
    return Task(
        name=entry["task"],
        instruction=entry["instruction"],
        metric=entry["metric"],
        role=entry.get("role", ""),
        group=entry.get("group", ""),
        source=entry.get("source", ""),
        rows={split: tuple(found) for split, found in rows.items()},
    )
