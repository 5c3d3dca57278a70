"""Whose cached prefixes a request may use: an opaque salt for the engine's prefix cache."""

from __future__ import annotations

import hashlib
import hmac

_SCHEME = "v1"


class CacheSalts:
    """Makes the salts of one inventory's requests, with the registry's secret.

    Nobody without the secret can make a salt that fits: a client's own is one field of it, and
    never reaches the engine. Replicas of one registry make the same salts.
    """

    def __init__(self, secret: bytes, inventory_sha256: str) -> None:
        self._secret = secret
        self._inventory = inventory_sha256

    def of(self, tenant: str, router_sha256: str, own: str) -> str:
        """The salt of a tenant's requests to a router, or to the base model where that is empty.

        `own` is what the client asks for, to keep its prefixes apart from others of its tenant.
        """
        digest = hmac.new(self._secret, digestmod=hashlib.sha256)
        for field in (_SCHEME, self._inventory, tenant, router_sha256, own):
            data = field.encode()
            # Its length before each field, so that no two lists of fields are the same bytes.
            digest.update(len(data).to_bytes(8))
            digest.update(data)
        return digest.hexdigest()
