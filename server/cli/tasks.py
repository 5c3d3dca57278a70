"""`polyrex tasks`: the tasks of a running server, over its HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.table import Table

tasks = typer.Typer(
    name="tasks",
    help="List, show, add and drop the tasks of a running server.",
    no_args_is_help=True,
)


Server = Annotated[str, typer.Option(help="The server's address.")]
ApiKeyFile = Annotated[Path | None, typer.Option(help="A file whose first line is an API key.")]


@tasks.callback()
def connect(
    context: typer.Context,
    server: Server = "http://127.0.0.1:8000",
    api_key_file: ApiKeyFile = None,
) -> None:
    context.obj = context.with_resource(client_of(server, api_key_file))


def client_of(server: str, api_key_file: Path | None) -> httpx.Client:
    """A client of a running server."""
    headers = {}
    if api_key_file is not None:
        headers["Authorization"] = f"Bearer {api_key_file.read_text().split()[0]}"
    return httpx.Client(base_url=server, headers=headers, timeout=60, trust_env=False)


@tasks.command("list")
def list_tasks(context: typer.Context) -> None:
    """List every task, in the order of their names."""
    table = Table("name", "version", "bytes", "description")
    for task in _pages(context.obj):
        table.add_row(
            task["name"], str(task["version"]), str(task["size_bytes"]), task["description"]
        )
    Console().print(table)


@tasks.command()
def show(context: typer.Context, name: str) -> None:
    """Print what the server knows of a task, as JSON."""
    _print(_ask(context.obj, "GET", f"/v1/tasks/{quote(name, safe='')}"))


@tasks.command()
def add(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The router's file.", exists=True, dir_okay=False)],
    name: Annotated[
        str | None, typer.Option(help="The task's name.", show_default="the file's name")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Give an existing task a new version.")
    ] = False,
) -> None:
    """Register a router as a task."""
    name = name or file.name.removesuffix(".safetensors")
    method, path = (
        ("PUT", f"/v1/tasks/{quote(name, safe='')}") if replace else ("POST", "/v1/tasks")
    )
    _print(
        _ask(
            context.obj,
            method,
            path,
            params={} if replace else {"name": name},
            content=file.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
    )


@tasks.command()
def drop(context: typer.Context, name: str) -> None:
    """Drop a task."""
    _print(_ask(context.obj, "DELETE", f"/v1/tasks/{quote(name, safe='')}"))


def _pages(client: httpx.Client) -> Iterator[dict[str, Any]]:
    after: dict[str, str] = {}
    more = True
    while more:
        page = _ask(client, "GET", "/v1/tasks", params={"limit": "1000", **after})
        yield from page["data"]
        more = page["has_more"]
        after = {"after": page["data"][-1]["name"]} if more else {}


def _ask(client: httpx.Client, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The server's answer; where it is an error, its message ends the command."""
    try:
        response = client.request(method, path, **request)
    except httpx.TransportError as error:
        typer.echo(f"polyrex tasks: {client.base_url}: {error}", err=True)
        raise typer.Exit(1) from error
    answer: dict[str, Any] = response.json()
    if response.is_error:
        typer.echo(f"polyrex tasks: {answer['error']['message']}", err=True)
        raise typer.Exit(1)
    return answer


def _print(answer: dict[str, Any]) -> None:
    typer.echo(json.dumps(answer, indent=2))
