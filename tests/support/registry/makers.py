"""What the fixtures of tests/server/registry make."""

from __future__ import annotations

from collections.abc import Callable

from polyrex.server.registry.principal import Principal
from polyrex.server.registry.registry import TaskRegistry

MakeRouter = Callable[..., bytes]
"""`make_small_router(seed, description=...)`: a router's file."""
OpenRegistry = Callable[..., TaskRegistry]
"""`open_registry(inventory, keep_versions=3)`: another registry on the test's database."""
AddTenant = Callable[..., Principal]
"""`add_tenant(registry, "acme", tasks=5)`: a task admin of a new tenant with that quota."""
