"""`polyrex tasks`: the tasks of a running server, over its HTTP API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import httpx
from cyclopts import Parameter
from cyclopts.types import ExistingFile, PositiveInt
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from .remote.connection import Client, ask, group, show_json

Name = Annotated[str, Parameter(help="Name of the task; `tenant:name` for another tenant's.")]
Version = Annotated[PositiveInt, Parameter(help="Number of the version.")]
Alias = Annotated[str, Parameter(help="Alias: `name@alias` means the version.")]
Tenant = Annotated[str, Parameter(help="Name of the other tenant.")]
Labels = Annotated[
    tuple[str, ...], Parameter(name="label", help="Label as key=value; may be given several times.")
]

app = group("tasks", "List, show, add, drop and change the tasks of a running server.")
command = app.meta


@app.command(name="list")
def list_tasks(
    *,
    query: Annotated[
        str | None, Parameter(help="Only tasks with this text in the name or the description.")
    ] = None,
    labels: Labels = (),
    deleted: Annotated[
        bool, Parameter(help="The tasks that were dropped, and can be undeleted.", negative=())
    ] = False,
    client: Client,
) -> None:
    """List the tenant's tasks, ordered by name."""
    wanted: dict[str, Any] = {"label": labels, "deleted": str(deleted).lower()}
    if query is not None:
        wanted["q"] = query
    table = Table("name", "version", "bytes", "labels", "description")
    for task in _pages(client, wanted):
        label = " ".join(f"{key}={value}" for key, value in task["labels"].items())
        sizes = (str(task["version"]), str(task["size_bytes"]))
        table.add_row(task["name"], *sizes, label, task["description"])
    Console().print(table)


@app.command
def show(
    name: Annotated[
        str, Parameter(help="Name of the task; `name@3` or `name@alias` for that version of it.")
    ],
    *,
    client: Client,
) -> None:
    """Print what the server knows of a task, as JSON."""
    show_json(ask(client, "GET", _path(name)))


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
    labels: Labels = (),
    client: Client,
) -> None:
    """Register a router as a task."""
    name = name or file.name.removesuffix(".safetensors")
    method, path = ("PUT", _path(name)) if replace else ("POST", "/v1/tasks")
    named = {} if replace else {"name": name}
    show_json(
        ask(
            client,
            method,
            path,
            params={**named, "label": labels},
            content=file.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
    )


@app.command
def drop(name: Name, *, client: Client) -> None:
    """Drop a task; it can be undeleted for some days."""
    show_json(ask(client, "DELETE", _path(name)))


@app.command
def undelete(name: Name, *, client: Client) -> None:
    """Take back a drop."""
    show_json(ask(client, "POST", _path(name, "undelete"), json={}))


@app.command
def versions(name: Name, *, client: Client) -> None:
    """List the versions of a task that are kept."""
    table = Table("version", "bytes", "router", "description")
    for version in ask(client, "GET", _path(name, "versions"))["data"]:
        table.add_row(
            str(version["version"]),
            str(version["size_bytes"]),
            version["router_sha256"][:12],
            version["description"],
        )
    Console().print(table)


@app.command
def rollback(
    name: Name,
    *,
    to: Annotated[
        PositiveInt | None,
        Parameter(help="Number of the version; the last before the current one if not given."),
    ] = None,
    client: Client,
) -> None:
    """Make another version the current one, an earlier or a later one."""
    show_json(ask(client, "POST", _path(name, "rollback"), json={"version": to}))


@app.command
def alias(name: Name, alias: Alias, version: Version, *, client: Client) -> None:
    """Give a version another name, or move that name to it."""
    body = {"version": version}
    show_json(ask(client, "PUT", _path(name, "aliases", alias), json=body))


@app.command
def unalias(name: Name, alias: Alias, *, client: Client) -> None:
    """Take a version's other name away."""
    show_json(ask(client, "DELETE", _path(name, "aliases", alias)))


@app.command
def canary(
    name: Name,
    version: Version,
    share: Annotated[
        float, Parameter(help="Share of the requests, 0 to 1.", validator=Number(gte=0, lte=1))
    ],
    *,
    client: Client,
) -> None:
    """Let another version answer a share of a task's requests."""
    body = {"version": version, "share": share}
    show_json(ask(client, "PUT", _path(name, "canary"), json=body))


@app.command
def uncanary(name: Name, *, client: Client) -> None:
    """Let the current version answer every request again."""
    show_json(ask(client, "DELETE", _path(name, "canary")))


@app.command
def share(name: Name, tenant: Tenant, *, client: Client) -> None:
    """Let another tenant use a task."""
    show_json(ask(client, "PUT", _path(name, "shared_with", tenant)))


@app.command
def unshare(name: Name, tenant: Tenant, *, client: Client) -> None:
    """Stop sharing a task with another tenant."""
    show_json(ask(client, "DELETE", _path(name, "shared_with", tenant)))


def _path(name: str, *parts: str) -> str:
    return "/".join(("/v1/tasks", *(quote(part, safe="") for part in (name, *parts))))


def _pages(client: httpx.Client, wanted: dict[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
    after: dict[str, str] = {}
    more = True
    while more:
        page = ask(client, "GET", "/v1/tasks", params={"limit": "1000", **wanted, **after})
        yield from page["data"]
        more = page["has_more"]
        after = {"after": page["data"][-1]["name"]} if more else {}
