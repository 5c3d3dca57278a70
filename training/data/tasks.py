"""Rows: a folder of JSONL files with a manifest, and the prompt that a row becomes.

`manifest.json` lists tasks (`task`, `role`, `instruction`, `metric`, ...); `tasks/NAME.jsonl` holds
one row a line: `split` (train, valid, test), `input`, `answer`, `options` (a list, or null).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from polyrex.adapters.errors import DataError

Split = Literal["train", "valid", "test"]
Metric = Literal["rank_classification_accuracy", "exact_match"]

MOST_OPTIONS_IN_PROMPT = 7


@dataclass(frozen=True)
class Row:
    """One labelled example. `options` are the allowed answers, where the task has any."""

    input: str
    answer: str
    options: tuple[str, ...] | None


@dataclass(frozen=True)
class Task:
    """A task's rows by split, with how it is asked and scored."""

    name: str
    instruction: str
    metric: Metric
    role: str
    group: str
    source: str
    rows: dict[Split, tuple[Row, ...]]


def prompt_of(instruction: str, row: Row) -> str:
    """Instruction, input, the options where there are 7 or fewer, and `Answer:`; the answer follows
    after one space."""
    lines = [instruction, row.input]
    if row.options and len(row.options) <= MOST_OPTIONS_IN_PROMPT:
        lines.append("Options: " + "; ".join(row.options))
    return "\n".join([*lines, "Answer:"])


def load_tasks(
    folder: Path, names: Sequence[str] | None = None, role: str | None = None
) -> list[Task]:
    """The tasks of a data folder, in the manifest's order: all, those named, or those of a role.

    Raises DataError naming the file and line: a missing manifest, an unknown task, a bad row.
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
    for number, (split, row) in enumerate(read_rows(lines, str(path)), start=1):
        if split not in rows:
            raise DataError(f"{path}:{number}: split {split!r}, expected {', '.join(rows)}")
        rows[split].append(row)
    return Task(
        name=entry["task"],
        instruction=entry["instruction"],
        metric=entry["metric"],
        role=entry.get("role", ""),
        group=entry.get("group", ""),
        source=entry.get("source", ""),
        rows={split: tuple(found) for split, found in rows.items()},
    )


def read_rows(lines: Iterable[str], source: str) -> list[tuple[Any, Row]]:
    """Parse JSONL rows into (split, row); raises DataError with `source` and the line's number."""
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            options = value.get("options")
            row = Row(value["input"], value["answer"], tuple(options) if options else None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{source}:{number}: not a row: {error!r}") from error
        if not isinstance(row.input, str) or not isinstance(row.answer, str):
            raise DataError(f"{source}:{number}: `input` and `answer` must be strings")
        if row.options and row.answer not in row.options:
            raise DataError(f"{source}:{number}: answer {row.answer!r} is not among its options")
        rows.append((value.get("split"), row))
    return rows
