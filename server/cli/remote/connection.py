"""How the commands that ask a running server reach it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
from cyclopts import App, Group, Parameter

from polyrex.server.cli.settings import EVERY_OPTION
from polyrex.server.config import FLAT
from polyrex.server.errors import ServerError


class CommandFailed(ServerError):
    """The server could not be asked, or refused."""


_MOST_SHOWN = 200  # characters of an answer that cannot be read
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
        if not words[0].isascii() or not words[0].isprintable():
            raise CommandFailed(f"{path}: an API key has printable ASCII characters only")
        return words[0]


Client = Annotated[httpx.Client, Parameter(parse=False)]
"""Made once for a command, and given to whichever subcommand runs."""


def group(name: str, text: str) -> App:
    """A command whose subcommands ask a running server: each gets a `client`.

    What the command line calls is its `meta`: that has the options of the connection, which may
    stand before a subcommand or after it.
    """
    app = App(
        name=name,
        help=text,
        default_parameter=EVERY_OPTION,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )

    def connect(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        connection: Annotated[Connection, FLAT] = Connection(),  # frozen
    ) -> None:
        function, bound, ignored = app.parse_args(tokens)
        if "client" not in ignored:  # help
            function(*bound.args, **bound.kwargs)
            return
        with connection.client() as client:
            function(*bound.args, **bound.kwargs, client=client)

    connect.__name__ = name  # a meta app has the name of its function
    app.meta.default(connect)
    return app


def ask(client: httpx.Client, method: str, path: str, **request: Any) -> dict[str, Any]:
    """The server's answer. Raises CommandFailed where it is an error, or none comes."""
    try:
        response = client.request(method, path, **request)
    except httpx.TransportError as error:
        raise CommandFailed(f"{client.base_url}: {error}") from error
    answer = read_answer(response)
    if response.is_error:
        raise CommandFailed(answer["error"]["message"])
    return answer


def read_answer(response: httpx.Response) -> dict[str, Any]:
    """The JSON of an answer; of an error, it has the message.

    Raises CommandFailed where it is not polyrex that answers, but a gateway before it.
    """
    try:
        answer: dict[str, Any] = response.json()
        if response.is_success or isinstance(answer["error"]["message"], str):
            return answer
    except (ValueError, LookupError, TypeError):
        pass
    start = " ".join(response.text.split())[:_MOST_SHOWN]
    raise CommandFailed(f"{response.url}: status {response.status_code}, not from polyrex: {start}")


def show_json(answer: dict[str, Any]) -> None:
    """Print an answer as JSON, for people and for programs alike."""
    print(json.dumps(answer, indent=2))
