"""`polyrex keys`: the API keys of a running server."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table

from polyrex.server.registry.principal import DEFAULT_TENANT, Role

from .connection import Client, CommandFailed, ask, group, show_json

DAY = 24 * 3600

Out = Annotated[
    Path | None,
    Parameter(help="New file for the key, which only its owner can read; stdout if not given."),
]

app = group("keys", "Create, list, rotate and revoke the API keys of a running server.")
command = app.meta


@app.command
def create(
    *,
    role: Annotated[Role, Parameter(help="What the key may do.")],
    tenant: Annotated[str, Parameter(help="Whose key it is.")] = DEFAULT_TENANT,
    label: Annotated[str, Parameter(help="A note on what it is for.")] = "",
    expires_in_days: Annotated[
        PositiveInt | None, Parameter(help="Days that it is valid; without an end if not given.")
    ] = None,
    out: Out = None,
    client: Client,
) -> None:
    """Make an API key and print it, this once."""
    expires_in = None if expires_in_days is None else float(expires_in_days * DAY)
    body = {"role": role, "label": label, "expires_in": expires_in}
    with _Destination(out) as destination:
        path = f"/v1/tenants/{quote(tenant, safe='')}/keys"
        destination.give(ask(client, "POST", path, json=body))


@app.command(name="list")
def list_keys(
    *,
    tenant: Annotated[str, Parameter(help="Whose keys.")] = DEFAULT_TENANT,
    client: Client,
) -> None:
    """List the keys of a tenant, valid or not, oldest first."""
    table = Table("id", "role", "label", "created", "expires", "revoked")
    for key in ask(client, "GET", f"/v1/tenants/{quote(tenant, safe='')}/keys")["data"]:
        times = (_day(key[name]) for name in ("created", "expires", "revoked"))
        table.add_row(key["id"], key["role"], key["label"], *times)
    Console().print(table)


@app.command
def rotate(
    key_id: Annotated[str, Parameter(name="id", help="Id of the key.")],
    /,
    *,
    grace_hours: Annotated[
        NonNegativeInt, Parameter(help="Hours that the old key is still valid.")
    ] = 0,
    out: Out = None,
    client: Client,
) -> None:
    """Replace a key by a new one and print it, this once."""
    with _Destination(out) as destination:
        path = f"/v1/keys/{quote(key_id, safe='')}/rotate"
        destination.give(ask(client, "POST", path, json={"grace": float(grace_hours * 3600)}))


@app.command
def revoke(
    key_id: Annotated[str, Parameter(name="id", help="Id of the key.")],
    /,
    *,
    client: Client,
) -> None:
    """Refuse a key from now on."""
    show_json(ask(client, "DELETE", f"/v1/keys/{quote(key_id, safe='')}"))


class _Destination:
    """Where a new key goes: a file is opened before the key is made, so that none is lost."""

    def __init__(self, out: Path | None) -> None:
        """Raises CommandFailed where the file exists or cannot be made."""
        self._out = out
        self._given = False
        self._file = None
        if out is not None:
            try:
                number = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError as error:
                raise CommandFailed(f"{out}: cannot be made: {error.strerror}") from error
            self._file = os.fdopen(number, "w")

    def __enter__(self) -> _Destination:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None and self._out is not None:
            self._file.close()
            if not self._given:
                self._out.unlink()

    def give(self, answer: dict[str, Any]) -> None:
        """Write the key, and print what else is known of it where that leaves the key alone."""
        secret = answer.pop("key")
        if self._file is None:
            print(secret)
        else:
            print(secret, file=self._file)
            show_json(answer)
        self._given = True


def _day(time: float | None) -> str:
    if time is None:
        return ""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M")
