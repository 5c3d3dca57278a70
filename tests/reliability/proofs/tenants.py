"""What one tenant can learn of another: from guesses at names, and from the prefix cache."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, contextmanager
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.base_model import load_base, load_tokenizer
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.requests.cache_salt import CacheSalts
from reliability.result import Result
from support.engine_calls import started
from support.fake_server import FakeEngine, serving
from support.prefix_cache.isolation import Isolation, Salt, run_isolation
from support.random_inventory import make_task
from support.reliability.small_base import Routers, SmallBase
from support.tenants.isolation import SENDS, Guessing, guess_at_tasks

CACHE = EmbeddedConfig(kv_cache_tokens=64 << 10, slots=64)


def guesses(small: SmallBase, folder: Path, *, count: int, shared: bool = False) -> Result:
    """Let a tenant send so many guesses at the names, versions, aliases and ids of another's tasks.

    `shared`: a planted defect, the guessing tenant may see the tasks after all.
    """
    inventory = small.read_inventory()
    make = Routers(inventory)
    tokenizer = load_tokenizer(str(small.base))
    with serving(folder, inventory, tokenizer, FakeEngine()) as served:
        found = guess_at_tasks(served.client, (make(1), make(2)), count)
    return _guesses(found, count)
