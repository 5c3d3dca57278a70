"""`polyrex fit`: from a few rows to a live task of a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from cyclopts import Parameter
from cyclopts.types import ExistingFile
from rich.console import Console
from rich.progress import Progress

from polyrex.adapters.errors import DataError
from polyrex.adapters.rows import read_rows
from polyrex.server.config import FLAT

from .remote.connection import CommandFailed, Connection, read_answer

Event = dict[str, Any]

_PATIENT = httpx.Timeout(60, read=None)
"""Beside a busy server, minutes may pass between two events."""

_SUMMED_UP = ("registered", "refused", None)
"""Events that end a fit, and errors, which are none: the summary says the same."""


def fit(
    *,
    task: Annotated[str, Parameter(help="Name of the task.")],
    rows: Annotated[ExistingFile, Parameter(help="JSON lines: input, answer, options.")],
    instruction: Annotated[str, Parameter(help="What is asked of every row, in words.")],
    replace: Annotated[
        bool, Parameter(help="Give an existing task a new version.", negative=())
    ] = False,
    as_json: Annotated[
        bool,
        Parameter(name="--json", help="Print the last event as JSON.", negative=()),
    ] = False,
    connection: Annotated[Connection, FLAT] = Connection(),  # noqa: B008  # frozen
) -> int:
    """Fit a task to a few rows on a running server, which serves it if it beats the base model.

    Prints the outcome in words on a terminal, and the last event as JSON elsewhere. Exits with 1
    if the task is not served, or if the server refuses.
    """
    body = {"instruction": instruction, "rows": _rows(rows), "replace": replace}
    path = f"/v1/tasks/{quote(task, safe='')}/fit"
    with connection.client() as client:
        try:
            last = _follow(_events(client, path, body), Console(stderr=True))
        except httpx.TransportError as error:
            print(f"polyrex fit: {client.base_url}: {error}", file=sys.stderr)
            return 1
        except CommandFailed as error:
            print(f"polyrex fit: {error}", file=sys.stderr)
            return 1
    if as_json or not sys.stdout.isatty():
        print(json.dumps(last, indent=2))
        print(_summary(last), file=sys.stderr)
    else:
        print(_summary(last))
    return 0 if last.get("event") == "registered" else 1


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [row.to_json() for row in read_rows(lines, str(path))]


def _events(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[Event]:
    """The events of a fit; the last is an error's body if the server refuses."""
    with client.stream("POST", path, json=body, timeout=_PATIENT) as response:
        if response.is_error:
            response.read()
            yield read_answer(response)
            return
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def _follow(events: Iterable[Event], console: Console) -> Event:
    """Show events as they come, as a bar on a terminal and as lines elsewhere; returns the last."""
    last: Event = {"error": {"message": "the server ended the fit without a result"}}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=None)
        for last in events:
            if last.get("event") == "progress":
                note = f"fitting, loss {last['loss']:.3f}"
                progress.update(bar, description=note, completed=last["step"], total=last["steps"])
            if not console.is_terminal and last.get("event") not in _SUMMED_UP:
                console.print(_line(last), markup=False, highlight=False, soft_wrap=True)
    return last


def _line(event: Event) -> str:
    """An event in words."""
    match event:
        case {"event": "started", "rows": rows, "device": device}:
            return f"started: {rows} rows to fit, on {device}"
        case {"event": "progress", "step": step, "steps": steps, "loss": loss}:
            return f"step {step} of {steps}: loss {loss:.3f}"
        case {"event": "scored"}:
            return f"scored: {_scores(event)}"
        case {"event": "registered", "task": task}:
            return f"registered: task {task['name']}, version {task['version']}"
        case {"event": "refused", "reason": reason}:
            return f"refused: {reason}"
        case {"error": {"message": message}}:
            return f"failed: {message}"
    return str(event.get("event", event))


def _summary(last: Event) -> str:
    """The outcome of the fit, with its scores."""
    match last:
        case {"event": "registered", "task": {"scores": {"held_out": scores}}}:
            return f"{_line(last)}; {_scores(scores)}"
        case {"event": "refused"}:
            return f"{_line(last)}; {_scores(last)}"
    return _line(last)


def _scores(scores: Event) -> str:
    return (
        f"{scores['metric']} {scores['adapted']:.3g} on {scores['rows']} rows held out,"
        f" base model {scores['base']:.3g}"
    )
