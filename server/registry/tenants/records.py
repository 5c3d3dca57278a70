"""What the registry knows of tenants and of their API keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from polyrex.server.registry.principal import Role


@dataclass(frozen=True)
class Quotas:
    """The most that a tenant may have or do; None is no limit."""

    tasks: int | None = None
    """Live tasks."""
    bytes: int | None = None
    """Bytes of the routers of all versions."""
    requests_per_minute: int | None = None
    """Requests for completions."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and of completions."""
    concurrent: int | None = None
    """Completions under way."""
    weight: int | None = None
    """No limit, but the tenant's part of the engine where others want it too; 1 if None."""

    @classmethod
    def read(cls, stored: Mapping[str, int]) -> Quotas:
        """Quotas as the database holds them."""
        return cls(**{field.name: stored.get(field.name) for field in fields(cls)})

    def stored(self) -> dict[str, int]:
        """What the database holds: the limits alone."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}

    def changed(self, changes: Mapping[str, int | None]) -> Quotas:
        """The same quotas, but for the named ones."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Tenant:
    """Whose tasks are kept apart from all others'."""

    id: int
    name: str
    created: float  # unix time, in seconds
    quotas: Quotas
    disabled: bool  # its keys are refused


@dataclass(frozen=True)
class Key:
    """An API key, without the secret, which nobody keeps."""

    id: str
    tenant: str
    role: Role
    label: str
    created: float  # unix times, in seconds
    expires: float | None
    revoked: float | None


@dataclass(frozen=True)
class NewKey:
    """A key that was just made; `secret` is the whole key, and is shown this once."""

    key: Key
    secret: str
