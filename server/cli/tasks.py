"""`polyrex tasks`: the tasks of a running server, over its HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from cyclopts import App, Group, Parameter
from cyclopts.types import ExistingFile
from rich.console import Console
from rich.table import Table

from polyrex.server.config import FLAT
from polyrex.server.errors import ServerError

from .settings import EVERY_OPTION


class CommandFailed(ServerError):
    """The server could not be asked, or refused."""


_SERVER = Parameter(group=Group("Server", sort_key=90))


@dataclass(frozen=True)
class Connection:
    """How to reach a running server."""

    server: Annotated[str, _SERVER] = "http://127.0.0.1:8000"
    """Address of the server."""
    api_key_file: Annotated[Path | None, _SERVER] = None
    """File whose first line is an API key."""

    def client(self) -> httpx.Client:
        """A client of the server. Raises CommandFailed where the key cannot be read."""
        headers = {}
        if self.api_key_file is not None:
            headers["Authorization"] = f"Bearer {self._key(self.api_key_file)}"
        return httpx.Client(base_url=self.server, headers=headers, timeout=60, trust_env=False)

    @staticmethod
    def _key(path: Path) -> str:
        try:
            words = path.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise CommandFailed(f"{path}: the API key cannot be read: {error}") from error
        if not words:
            raise CommandFailed(f"{path}: holds no API key")
        return words[0]


Client = Annotated[httpx.Client, Parameter(parse=False)]
"""Made by `tasks` for every subcommand."""

app = App(
    name="tasks",
    help="List, show, add and drop the tasks of a running server.",
    default_parameter=EVERY_OPTION,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)
command = app.meta
"""`app` with the options of `tasks`, which may stand before a subcommand or after it."""


@command.default
def tasks(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    connection: Annotated[Connection, FLAT] = Connection(),
) -> None:
    """List, show, add and drop the tasks of a running server."""
    function, bound, ignored = app.parse_args(tokens)
    if "client" not in ignored:  # help
        function(*bound.args, **bound.kwargs)
        return
    with connection.client() as client:
        function(*bound.args, **bound.kwargs, client=client)


@app.command(name="list")
def list_tasks(*, client: Client) -> None:
    """List every task, ordered by name."""
    table = Table("name", "version", "bytes", "description")
    for task in _pages(client):
        table.add_row(
            task["name"], str(task["version"]), str(task["size_bytes"]), task["description"]
        )
    Console().print(table)


@app.command
def show(name: str, *, client: Client) -> None:
    """Print what the server knows of a task, as JSON."""
    _print(_ask(client, "GET", f"/v1/tasks/{quote(name, safe='')}"))


@app.command
def add(
    file: Annotated[ExistingFile, Parameter(help="The router's file.")],
    *,
    name: Annotated[
        str | None, Parameter(help="Name of the task; the file's name if not given.")
    ] = None,
    replace: Annotated[
        bool, Parameter(help="Give an existing task a new version.", negative=())
    ] = False,
    client: Client,
) -> None:
    """Register a router as a task."""
    name = name or file.name.removesuffix(".safetensors")
    method, path = (
        ("PUT", f"/v1/tasks/{quote(name, safe='')}") if replace else ("POST", "/v1/tasks")
    )
    _print(
        _ask(
            client,
            method,
            path,
            params={} if replace else {"name": name},
            content=file.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
    )


@app.command
def drop(name: str, *, client: Client) -> None:
    """Drop a task."""
    _print(_ask(client, "DELETE", f"/v1/tasks/{quote(name, safe='')}"))


def _pages(client: httpx.Client) -> Iterator[dict[str, Any]]:
    after: dict[str, str] = {}
    more = True
    while more:
        page = _ask(client, "GET", "/v1/tasks", params={"limit": "1000", **after})
        yield from page["data"]
        more = page["has_more"]
        after = {"after": page["data"][-1]["name"]} if more else {}


def _ask(client: httpx.Client, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The server's answer. Raises CommandFailed where it is an error, or none comes."""
    try:
        response = client.request(method, path, **request)
    except httpx.TransportError as error:
        raise CommandFailed(f"{client.base_url}: {error}") from error
    answer: dict[str, Any] = response.json()
    if response.is_error:
        raise CommandFailed(answer["error"]["message"])
    return answer


def _print(answer: dict[str, Any]) -> None:
    print(json.dumps(answer, indent=2))
