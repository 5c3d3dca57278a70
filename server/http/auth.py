"""Who may come in: every request but those of open routes passes the guard before it is read."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from polyrex.server.config import ServerConfig
from polyrex.server.errors import AuthenticationError, Forbidden, ServerError, StartError
from polyrex.server.registry.principal import OPERATOR, Principal
from polyrex.server.registry.storage.private import check_private
from polyrex.server.registry.tenants.directory import Directory
from polyrex.server.registry.tenants.secret_keys import PREFIX, digest

from .access import rule_of
from .error_handlers import error_response
from .hosts import accepted_hosts, check_host, check_origin


def read_key_digests(path: Path) -> tuple[bytes, ...]:
    """Read a file of keys, one a line, as sha256 digests.

    Raises StartError where it has none, or where every user could add one.
    """
    try:
        check_private(path)
        keys = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"{path}: the API keys cannot be read: {error}") from error
    digests = tuple(digest(key.strip()) for key in keys if key.strip())
    if not digests:
        raise StartError(f"{path}: holds no API key; it needs one a line")
    return digests


class Keys:
    """The API keys of a server: those of its key file, and those of the registry."""

    def __init__(self, file_digests: Sequence[bytes], directory: Directory) -> None:
        self._file_digests = tuple(file_digests)
        self._directory = directory

    def principal(self, method: str, headers: Headers) -> Principal:
        """Who sends a request with these headers.

        Where there is no key file, whoever comes without a key of the registry is the operator:
        OpenAI's clients always send some key. Raises AuthenticationError, or Forbidden for web
        pages that would be the operator.
        """
        given = headers.getlist("authorization")
        if len(given) > 1:
            raise AuthenticationError("send one Authorization header")
        scheme, _, key = given[0].partition(" ") if given else ("", "", "")
        key = key.strip() if scheme.lower() == "bearer" else ""
        if not self._file_digests and not key.startswith(PREFIX):
            check_origin(method, headers)
            return OPERATOR
        return self._of_file(key) or self._directory.authenticate(key)

    def _of_file(self, key: str) -> Principal | None:
        given = digest(key)
        # Every key is compared, so that the time taken reveals nothing about any of them.
        matches = [hmac.compare_digest(given, known) for known in self._file_digests]
        if not any(matches):
            return None
        return Principal(OPERATOR.tenant, OPERATOR.role, f"file:{matches.index(True) + 1}")


class Guard:
    """Lets a request through to its route where its sender may use that route.

    Routes find the sender in `request.state.principal`. Who comes without a valid key learns
    nothing, not even which routes there are.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, directory: Directory) -> None:
        self._app = app
        self._hosts = accepted_hosts(config)
        self._keys = Keys(config.api_key_digests, directory)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ServerError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        rule = rule_of(scope)
        if rule is not None and rule.open:
            return
        headers = Headers(scope=scope)
        check_host(headers, self._hosts)
        principal = self._keys.principal(scope["method"], headers)
        scope.setdefault("state", {})["principal"] = principal
        if rule is not None and principal.role not in rule.roles:
            raise Forbidden(f"a key with the role {principal.role} may not do this")
