"""The schema of labelled rows: what training data, a fit over HTTP and `polyrex fit` are made of.

A row is a JSON object; a file of rows has one a line.

| key | value |
|---|---|
| input | text |
| answer | text; one of the options where there are any |
| options | a list of texts; null, empty or absent where any answer is allowed |
| split | `train`, `valid` or `test`, in data folders alone |
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import DataError

KEYS = ("input", "answer", "options", "split")


@dataclass(frozen=True)
class Row:
    """One labelled example."""

    input: str
    answer: str
    options: tuple[str, ...] | None = None
    """The allowed answers; None where any text is allowed."""
    split: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, without its split."""
        return {"input": self.input, "answer": self.answer, "options": self.options}


def parse_row(value: object, where: str) -> Row:
    """A row from its JSON value; keys that the schema does not know are ignored.

    Raises DataError that begins with `where`, and names the key, what it expected and what came.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: a row must be a JSON object, got {value!r:.80}")
    for key in ("input", "answer"):
        if key not in value:
            near = difflib.get_close_matches(key, [str(k) for k in value], n=1)
            hint = f"; is `{near[0]}` meant to be `{key}`?" if near else ""
            raise DataError(f"{where}: `{key}` is missing{hint}")
        _check_text(value[key], f"{where}: `{key}`")
    split = value.get("split")
    if split is not None and not isinstance(split, str):
        raise DataError(f"{where}: `split` must be text, got {split!r:.80}")
    return Row(value["input"], value["answer"], _options(value, where), split)


def read_rows(lines: Iterable[str], source: str) -> list[Row]:
    """The rows of a JSONL file; raises DataError that names `source`, the line and the key."""
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{source}:{number}: not a row: the line is not JSON: {error}"
            ) from error
        rows.append(parse_row(value, f"{source}:{number}"))
    return rows


def _options(value: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    options = value.get("options")
    if options is None or options == []:
        return None
    if not isinstance(options, list):
        raise DataError(f"{where}: `options` must be a list of texts or null, got {options!r:.80}")
    for index, option in enumerate(options):
        _check_text(option, f"{where}: `options[{index}]`")
    if value["answer"] not in options:
        raise DataError(f"{where}: answer {value['answer']!r:.80} is not among its options")
    return tuple(options)


def _check_text(value: object, what: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, got {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        raise DataError(f"{what} holds half a surrogate pair") from error
