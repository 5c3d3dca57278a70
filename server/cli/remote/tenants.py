"""`polyrex tenants`: the tenants of a running server, and their quotas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.table import Table

from polyrex.server.config import FLAT

from .connection import Client, ask, group, show_json


def _check_limit(_hint: object, limit: str | None) -> None:
    if limit is not None and not re.fullmatch("unlimited|[0-9]{1,15}", limit):
        raise ValueError("must be a whole number from 0 on, or unlimited")


Limit = Annotated[str | None, Parameter(validator=_check_limit)]
Weight = Annotated[int | None, Parameter(validator=Number(gte=1, lte=1000))]

app = group("tenants", "Create, list and change the tenants of a running server.")
command = app.meta


@dataclass(frozen=True)
class Limits:
    """Quotas: a number, or `unlimited`. One that is not given stays as it is."""

    tasks: Limit = None
    """Most tasks."""
    bytes: Limit = None
    """Most bytes of routers, of all versions together."""
    requests_per_minute: Limit = None
    """Most requests for completions in a minute, on each server."""
    tokens_per_minute: Limit = None
    """Most tokens of prompts and completions in a minute, on each server."""
    concurrent: Limit = None
    """Most completions under way at once, on each server."""
    weight: Weight = None
    """The tenant's part of the engine where others want it too; 1 for those that have none."""

    def changes(self) -> dict[str, int | None]:
        """The quotas that were given, as the server reads them."""
        return {
            name: None if limit == "unlimited" else int(limit)
            for name, limit in asdict(self).items()
            if limit is not None
        }


@app.command
def create(
    name: Annotated[str, Parameter(help="Name of the tenant.")],
    *,
    limits: Annotated[Limits, FLAT] = Limits(),
    client: Client,
) -> None:
    """Make a tenant; quotas that are not given are unlimited."""
    show_json(ask(client, "POST", "/v1/tenants", json={"name": name, "quotas": limits.changes()}))


@app.command(name="list")
def list_tenants(*, client: Client) -> None:
    """List every tenant with its quotas, ordered by name."""
    names = tuple(asdict(Limits()))
    table = Table("name", *(name.replace("_", " ") for name in names), "disabled")
    for tenant in _pages(client):
        limits = (tenant["quotas"][name] for name in names)
        shown = ("" if limit is None else str(limit) for limit in limits)
        table.add_row(tenant["name"], *shown, "yes" if tenant["disabled"] else "")
    Console().print(table)


@app.command(name="set")
def change(
    name: Annotated[str, Parameter(help="Name of the tenant.")],
    *,
    limits: Annotated[Limits, FLAT] = Limits(),
    disabled: Annotated[
        bool | None,
        Parameter(help="Refuse the tenant's keys, or take them again.", negative="--enabled"),
    ] = None,
    client: Client,
) -> None:
    """Change a tenant's quotas, or disable it; what is not given stays."""
    body: dict[str, Any] = {"quotas": limits.changes(), "disabled": disabled}
    show_json(ask(client, "PATCH", f"/v1/tenants/{quote(name, safe='')}", json=body))


def _pages(client: Client) -> Iterator[dict[str, Any]]:
    page: dict[str, Any] = {"has_more": True}
    after = ""
    while page["has_more"]:
        page = ask(client, "GET", "/v1/tenants", params={"limit": "1000", "after": after})
        yield from page["data"]
        after = page["data"][-1]["name"]
