"""Which role may use which route: one table, for the check, the docs and the tests.

A route that is not in the table can be used by nobody, and keeps the application from starting.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from polyrex.server.errors import StartError
from polyrex.server.registry.principal import Role


@dataclass(frozen=True)
class Rule:
    """Who may use a route."""

    roles: frozenset[Role] = frozenset()
    open: bool = False  # to anybody, without a key


_ANYBODY = Rule(open=True)
_EVERY_KEY = Rule(frozenset(Role))
_READERS = Rule(frozenset({Role.inference, Role.task_admin, Role.server_admin}))
_TASK_ADMINS = Rule(frozenset({Role.task_admin, Role.server_admin}))
_SERVER_ADMINS = Rule(frozenset({Role.server_admin}))
_METRICS = Rule(frozenset({Role.metrics, Role.server_admin}))
_NOBODY = Rule()

ACCESS: Mapping[tuple[str, str], Rule] = {
    ("GET", "/livez"): _ANYBODY,
    ("GET", "/readyz"): _ANYBODY,
    ("GET", "/metrics"): _METRICS,
    ("GET", "/v1/whoami"): _EVERY_KEY,
    ("GET", "/"): _READERS,
    ("GET", "/docs"): _READERS,
    ("GET", "/docs/oauth2-redirect"): _READERS,
    ("GET", "/redoc"): _READERS,
    ("GET", "/openapi.json"): _READERS,
    ("POST", "/v1/completions"): _READERS,
    ("POST", "/v1/chat/completions"): _READERS,
    ("GET", "/v1/models"): _READERS,
    ("GET", "/v1/models/{name}"): _READERS,
    ("GET", "/v1/tasks"): _READERS,
    ("GET", "/v1/tasks/{name}"): _READERS,
    ("GET", "/v1/tasks/{name}/versions"): _READERS,
    ("POST", "/v1/tasks"): _TASK_ADMINS,
    ("PUT", "/v1/tasks/{name}"): _TASK_ADMINS,
    ("DELETE", "/v1/tasks/{name}"): _TASK_ADMINS,
    ("POST", "/v1/tasks/{name}/undelete"): _TASK_ADMINS,
    ("POST", "/v1/tasks/{name}/rollback"): _TASK_ADMINS,
    ("PUT", "/v1/tasks/{name}/aliases/{alias}"): _TASK_ADMINS,
    ("DELETE", "/v1/tasks/{name}/aliases/{alias}"): _TASK_ADMINS,
    ("PUT", "/v1/tasks/{name}/canary"): _TASK_ADMINS,
    ("DELETE", "/v1/tasks/{name}/canary"): _TASK_ADMINS,
    ("PUT", "/v1/tasks/{name}/shared_with/{tenant}"): _TASK_ADMINS,
    ("DELETE", "/v1/tasks/{name}/shared_with/{tenant}"): _TASK_ADMINS,
    ("PUT", "/v1/tasks/{name}/labels"): _TASK_ADMINS,
    ("POST", "/v1/tasks/{name}/fit"): _TASK_ADMINS,
    ("POST", "/v1/load_lora_adapter"): _TASK_ADMINS,
    ("POST", "/v1/unload_lora_adapter"): _TASK_ADMINS,
    ("POST", "/v1/tenants"): _SERVER_ADMINS,
    ("GET", "/v1/tenants"): _SERVER_ADMINS,
    ("GET", "/v1/tenants/{name}"): _SERVER_ADMINS,
    ("PATCH", "/v1/tenants/{name}"): _SERVER_ADMINS,
    ("POST", "/v1/tenants/{name}/keys"): _SERVER_ADMINS,
    ("GET", "/v1/tenants/{name}/keys"): _SERVER_ADMINS,
    ("POST", "/v1/keys/{key_id}/rotate"): _SERVER_ADMINS,
    ("DELETE", "/v1/keys/{key_id}"): _SERVER_ADMINS,
}


def rule_of(scope: Scope) -> Rule | None:
    """The rule of the route that will answer this request; None where none will.

    It asks the routes themselves, as the router does: no reading of the path but the router's own
    decides.
    """
    for route in scope["app"].routes:
        if route.matches(scope)[0] is Match.FULL:
            path = route.path if isinstance(route, Route) else ""
            return ACCESS.get((_method(scope["method"]), path), _NOBODY)
    return None


def methods_of(scope: Scope) -> list[str]:
    """The methods with which the path of this request can be asked, whichever route has them."""
    routes = (route for route in scope["app"].routes if isinstance(route, Route))
    known = [route for route in routes if route.matches(scope)[0] is not Match.NONE]
    return sorted({method for route in known for method in route.methods or ()})


def check_declared(routes: Iterable[BaseRoute]) -> None:
    """Raise StartError where a route has no rule."""
    for route in routes:
        methods = (route.methods or set()) if isinstance(route, Route) else {"any method"}
        path = getattr(route, "path", route)
        for method in sorted(methods):
            if (_method(method), path) not in ACCESS:
                raise StartError(f"{method} {path}: http/access.py does not say who may use it")


def access_table() -> str:
    """The table as Markdown, for docs/tenants.md."""
    lines = [
        f"| route | {' | '.join(Role)} |",
        f"|---|{':-:|' * len(Role)}",
        *(f"| `{method} {path}` | {_marks(rule)} |" for (method, path), rule in ACCESS.items()),
    ]
    return "\n".join(lines)


def _marks(rule: Rule) -> str:
    if rule.open:
        return " | ".join(["no key"] * len(Role))
    return " | ".join("yes" if role in rule.roles else "" for role in Role)


def _method(method: str) -> str:
    return "GET" if method == "HEAD" else method  # where a route answers HEAD, it is as GET
