"""Log lines: JSON for collectors, text for people. Each says which request it belongs to.

Nothing here reads a request's body: prompts, routers and keys come into no line. What clients
choose is escaped, so that no line can look like two or change a terminal, and every value is cut.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import time
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any, TextIO

from polyrex.server.config import LogFormat

from .requests import current_request

MOST_CHARACTERS = 256
"""Of a value of a line, and of a line of an exception."""
_MOST_LINES = 60
"""Of an exception: the last ones say what happened."""
_MOST_WAITING = 1 << 14  # lines
_LAST_SECONDS = 1.0
"""What lines that wait get at the end of the process."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def set_up_logging(form: LogFormat | None, stream: TextIO | None = None) -> LogFormat:
    """Send log lines of level INFO and above to standard error; the form that they have.

    If none is given it is text on a terminal, and JSON elsewhere.
    """
    stream = stream or sys.stderr
    chosen = form or (LogFormat.text if stream.isatty() else LogFormat.json)
    lines: queue.Queue[logging.LogRecord] = queue.Queue(_MOST_WAITING)
    handler = _WaitsForNobody(lines)
    handler.setFormatter(JsonLines() if chosen is LogFormat.json else TextLines())
    QueueListener(lines, logging.StreamHandler(stream)).start()
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return chosen


class _WaitsForNobody(QueueHandler):
    """Leaves lines to a thread. Where the terminal, or a collector, does not take them, requests
    go on, and lines are lost that do not fit the queue."""

    def __init__(self, lines: queue.Queue[logging.LogRecord]) -> None:
        super().__init__(lines)
        self._lines = lines
        self._lost = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self._lost:
                self._lines.put_nowait(self._notice())
                self._lost = 0
            self._lines.put_nowait(record)
        except queue.Full:
            self._lost += 1

    def _notice(self) -> logging.LogRecord:
        text = "%d log lines were lost: nobody took them"
        about = (__name__, logging.WARNING, __file__, 0, text, (self._lost,), None)
        notice: logging.LogRecord = self.prepare(logging.LogRecord(*about))
        return notice

    def flush(self) -> None:
        """Wait a moment until the lines are written; logging does so at the end."""
        end = time.monotonic() + _LAST_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)


class JsonLines(logging.Formatter):
    """One JSON object a line. `extra={"fields": {...}}` of a log call adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        for name, value in _fields(record).items():
            line.setdefault(name, _cut(value) if isinstance(value, str) else value)
        if record.exc_info:
            line["exception"] = "\n".join(_exception(self, record))
        return json.dumps(line, default=lambda value: _cut(str(value)))


class TextLines(logging.Formatter):
    """Level, logger, message, and what is known of the request."""

    def format(self, record: logging.LogRecord) -> str:
        about = "".join(f" {name}={_text(str(v))}" for name, v in _fields(record).items())
        head = f"{record.levelname} {record.name}: {_text(record.getMessage())}{about}"
        return "\n".join([head, *(_exception(self, record) if record.exc_info else ())])


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return current_request().fields() | getattr(record, "fields", {})


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> list[str]:
    assert record.exc_info
    lines = formatter.formatException(record.exc_info).split("\n")
    return [_text(line) for line in lines[-_MOST_LINES:]]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def _text(text: str) -> str:
    """Cut, and with control characters as Python writes them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], _cut(text))
