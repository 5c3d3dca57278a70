"""Tenants and keys of a running server that asks for keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

OPERATOR_KEY = "the-operators-key"
"""The one line of the key file; its holder administers the server."""
OPERATOR_DIGESTS = (hashlib.sha256(OPERATOR_KEY.encode()).digest(),)


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"authorization": f"Bearer {key}"}


@contextmanager
def client_of(url: str, key: str) -> Iterator[httpx.Client]:
    """A client that sends a key with every request."""
    with httpx.Client(base_url=url, timeout=30, trust_env=False, headers=bearer(key)) as client:
        yield client


def make_tenant(operator: httpx.Client, name: str, **quotas: int) -> None:
    """Make a tenant with quotas."""
    response = operator.post("/v1/tenants", json={"name": name, "quotas": quotas})
    response.raise_for_status()


def make_key(operator: httpx.Client, tenant: str, role: str) -> str:
    """Make a key of a tenant."""
    response = operator.post(f"/v1/tenants/{tenant}/keys", json={"role": role})
    response.raise_for_status()
    key: str = response.json()["key"]
    return key


def revoke(operator: httpx.Client, key: str) -> None:
    """Revoke a key."""
    operator.delete(f"/v1/keys/{key.split('_')[1]}").raise_for_status()
