"""`polyrex fit`: from a few rows to a live task of a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.progress import Progress

from .tasks import ApiKeyFile, Server, client_of

_PATIENT = httpx.Timeout(60, read=None)
"""Beside a busy server, minutes may pass between two events; whoever leaves would end the fit."""


def fit(
    task: Annotated[str, typer.Option(help="The task's name.")],
    rows: Annotated[
        Path,
        typer.Option(help="JSON lines: input, answer, options.", exists=True, dir_okay=False),
    ],
    instruction: Annotated[str, typer.Option(help="What is asked of every row, in words.")],
    server: Server = "http://127.0.0.1:8000",
    api_key_file: ApiKeyFile = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give an existing task a new version.")
    ] = False,
) -> None:
    """Fit a task to a few rows on a running server, which serves it where it beats the base model.

    Exits with 1 where it does not, or where the server refuses.
    """
    body = {"instruction": instruction, "rows": _rows(rows), "replace": replace}
    client = client_of(server, api_key_file)
    with client, Progress(transient=True) as progress:
        bar = progress.add_task("starting", total=None)
        last: dict[str, Any] = {}
        for last in _events(client, f"/v1/tasks/{quote(task, safe='')}/fit", body):
            if last.get("event") == "progress":
                note = f"fitting, loss {last['loss']:.3f}"
                progress.update(bar, description=note, completed=last["step"], total=last["steps"])
    typer.echo(json.dumps(last, indent=2))
    if last.get("event") != "registered":
        raise typer.Exit(1)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        typer.echo(f"polyrex fit: {path}: cannot be read: {error}", err=True)
        raise typer.Exit(2) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("input", "answer", "options") if key in row})
        except (ValueError, TypeError) as error:
            typer.echo(f"polyrex fit: {path}:{number}: not a row: {error}", err=True)
            raise typer.Exit(2) from error
    return rows


def _events(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        with client.stream("POST", path, json=body, timeout=_PATIENT) as response:
            if response.is_error:
                yield json.loads(response.read())
                return
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))
    except httpx.TransportError as error:
        typer.echo(f"polyrex fit: {client.base_url}: {error}", err=True)
        raise typer.Exit(1) from error
