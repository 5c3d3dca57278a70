"""Which requests a server takes that lets everybody in who can reach it: not those of web pages.

A browser on the same machine can reach a server on loopback, for any page that it shows. A page
that has its own name resolve to loopback sends that name as Host; any other page is of another
origin.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from polyrex.server.config import ServerConfig
from polyrex.server.errors import Forbidden, InvalidRequest

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def accepted_hosts(config: ServerConfig) -> frozenset[str] | None:
    """The names that a Host header may have; None for any."""
    if config.allowed_hosts:
        return frozenset(host.lower() for host in config.allowed_hosts)
    if config.api_key_digests or not is_loopback(config.host):
        return None
    own = f"[{config.host}]" if ":" in config.host else config.host
    return _LOOPBACK | {own}


def check_host(headers: Headers, accepted: frozenset[str] | None) -> None:
    """Raise InvalidRequest where the Host header has none of the names, with any port."""
    if accepted is None:
        return
    given = headers.get("host", "")
    match = _HOST.fullmatch(given.lower())
    if match is None or match[1] not in accepted:
        raise InvalidRequest(
            f"this server does not answer for Host {given!r:.80}: --allowed-hosts names the others"
        )


def check_origin(method: str, headers: Headers) -> None:
    """Raise Forbidden where a web page of another origin wants to change something.

    Browsers say where a request comes from, and pages cannot keep them from it.
    """
    if method in _SAFE:
        return
    site = headers.get("sec-fetch-site")
    origin = headers.get("origin")
    if site is not None:
        foreign = site not in ("same-origin", "none")
    else:
        foreign = origin is not None and not _is_of(origin, headers.get("host"))
    if foreign:
        raise Forbidden("a page of another origin may not use this server without an API key")


def _is_of(origin: str, host: str | None) -> bool:
    """Whether an Origin header names this host and port."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:  # nothing that a browser would send
        return False
