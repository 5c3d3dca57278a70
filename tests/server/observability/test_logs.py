"""Log lines: one object a line, cut and escaped, with what is known of the request."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from polyrex.server.config import LogFormat
from polyrex.server.observability import logs
from polyrex.server.observability.logs import JsonLines, TextLines, set_up_logging
from polyrex.server.observability.requests import RequestRecord, begin_request, end_request
from polyrex.server.registry.principal import Principal

NASTY = "one\ntwo\x1b[31mred\x00\u2028\u0085\udc80end"


def logged(formatter: logging.Formatter, message: str, *args: object, **named: Any) -> str:
    """What a formatter makes of one call."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("polyrex.some")
    logger.addHandler(handler)
    logger.info(message, *args, **named)
    return stream.getvalue()


@pytest.fixture
def request_under_way() -> Iterator[RequestRecord]:
    record = RequestRecord(id="abc-1", state={"principal": Principal("acme")})
    token = begin_request(record)
    yield record
    end_request(token)


def test_a_json_line_says_when_who_and_what() -> None:
    line = json.loads(logged(JsonLines(), "%d tasks", 3, extra={"fields": {"seconds": 0.5}}))
    time = line.pop("time")
    assert time.endswith("+00:00")
    assert line == {"level": "info", "logger": "polyrex.some", "message": "3 tasks", "seconds": 0.5}


def test_lines_name_the_request_under_way(request_under_way: RequestRecord) -> None:
    line = json.loads(logged(JsonLines(), "hm"))
    assert (line["request_id"], line["tenant"]) == ("abc-1", "acme")
    assert logged(TextLines(), "hm").endswith("some: hm request_id=abc-1 tenant=acme\n")


def test_lines_outside_of_requests_name_none() -> None:
    assert "request_id" not in json.loads(logged(JsonLines(), "hm"))


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()], ids=["json", "text"])
def test_what_clients_choose_stays_on_its_line(formatter: logging.Formatter) -> None:
    line = logged(formatter, "got %s", NASTY, extra={"fields": {"path": NASTY}})
    assert line.count("\n") == 1
    assert line.endswith("\n")
    assert line.isascii()
    assert line[:-1].isprintable()


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()], ids=["json", "text"])
def test_values_are_cut(formatter: logging.Formatter) -> None:
    line = logged(formatter, "got %s", "m" * 10_000, extra={"fields": {"path": "p" * 10_000}})
    assert 250 < line.count("m") < 265
    assert 250 < line.count("p") < 265


def test_an_exception_is_a_field_of_its_line() -> None:
    try:
        raise ValueError(NASTY + "x" * 10_000)
    except ValueError:
        line = logged(JsonLines(), "failed", exc_info=True)
    found = json.loads(line)
    assert found["message"] == "failed"
    assert found["exception"].startswith("Traceback (most recent call last):\n")
    assert "ValueError: one" in found["exception"]
    assert len(found["exception"]) < 2000
    assert (line.count("\n"), "\x1b" in line) == (1, False)


def test_fields_do_not_replace_what_every_line_has() -> None:
    line = json.loads(logged(JsonLines(), "hm", extra={"fields": {"level": "none", "time": "0"}}))
    assert line["level"] == "info"
    assert line["time"] != "0"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("form", "stream", "chosen"),
    [
        (None, io.StringIO(), LogFormat.json),
        (None, Terminal(), LogFormat.text),
        (LogFormat.json, Terminal(), LogFormat.json),
        (LogFormat.text, io.StringIO(), LogFormat.text),
    ],
)
def test_people_read_text_and_collectors_json(
    form: LogFormat | None,
    stream: io.StringIO,
    chosen: LogFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    assert set_up_logging(form, stream) is chosen
    root.info("hello")
    root.handlers[0].flush()
    assert stream.getvalue().startswith("{" if chosen is LogFormat.json else "INFO root: hello")


def test_a_collector_that_stalls_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(logging, "root", root)
    monkeypatch.setattr(logs, "_MOST_WAITING", 1000)
    reading, writing = os.pipe()
    with open(reading) as late, ThreadPoolExecutor() as pool:
        with open(writing, "w") as stalled:
            set_up_logging(LogFormat.text, stalled)
            for number in range(5000):
                root.info("line %d of those that nobody takes", number)
            told = pool.submit(late.readlines)
            root.handlers[0].flush()
            root.info("the last")
            root.handlers[0].flush()
        *lines, last = told.result()
    lost = sum(int(line.split()[2]) for line in lines if "WARNING" in line)
    assert lines[0] == "INFO root: line 0 of those that nobody takes\n"
    assert 0 < lost == 5000 - sum("of those that" in line for line in lines)
    assert last == "INFO root: the last\n"
