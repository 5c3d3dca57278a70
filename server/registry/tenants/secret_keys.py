"""The text of API keys: `plx_`, a public id, and a secret of 256 bits."""

from __future__ import annotations

import hashlib
import secrets

PREFIX = "plx_"
"""What the keys of the registry begin with; those of a key file may look like anything."""


def make_key() -> tuple[str, str]:
    """A new key: its id, and the whole."""
    key_id = secrets.token_hex(8)
    return key_id, f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"


def id_of(key: str) -> str:
    """The id in a key, empty where it has none."""
    return key.removeprefix(PREFIX).partition("_")[0] if key.startswith(PREFIX) else ""


def digest(key: str) -> bytes:
    """What is stored of a key: its sha256, enough for a secret that cannot be guessed."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
