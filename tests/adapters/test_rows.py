"""The schema of labelled rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from polyrex.adapters.errors import DataError
from polyrex.adapters.rows import Row, parse_row, read_rows

GOOD: dict[str, Any] = {"input": "fox", "answer": "foxes", "options": ["foxes", "foxs"]}


def test_a_row_is_read_and_written_back() -> None:
    row = parse_row(GOOD, "row")
    assert row == Row("fox", "foxes", ("foxes", "foxs"))
    assert json.loads(json.dumps(row.to_json())) == GOOD
    assert parse_row(row.to_json() | {"options": None}, "row").options is None
    assert parse_row(GOOD | {"split": "train", "source": "web"}, "row").split == "train"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 3}, "rows[2]: `answer` must be text, got 3"),
        ({"input": "\ud83d"}, "rows[2]: `input` holds half a surrogate pair"),
        ({"options": "foxes"}, "rows[2]: `options` must be a list of texts or null, got 'foxes'"),
        ({"options": ["foxes", None]}, "rows[2]: `options[1]` must be text, got None"),
        ({"options": ["a", "b"]}, "rows[2]: answer 'foxes' is not among its options"),
        ({"split": 1}, "rows[2]: `split` must be text, got 1"),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        parse_row(GOOD | changes, "rows[2]")
    assert str(raised.value) == message


def test_a_misspelt_key_is_named_with_the_right_one() -> None:
    with pytest.raises(DataError) as raised:
        parse_row({"input": "fox", "anwser": "foxes"}, "rows[0]")
    assert str(raised.value) == "rows[0]: `answer` is missing; is `anwser` meant to be `answer`?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "rows.jsonl:2: not a row"),
        ("[]", "rows.jsonl:2: a row must be a JSON object, got []"),
        ("[" * 100_000, "rows.jsonl:2: not a row"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, message: str) -> None:
    with pytest.raises(DataError, match="rows") as raised:
        read_rows([json.dumps(GOOD), line], "rows.jsonl")
    assert str(raised.value).startswith(message)
