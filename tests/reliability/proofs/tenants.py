"""What one tenant can learn of another: from guesses at names, and from the prefix cache."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.launch.loading import shipped_inventory
from polyrex.server.registry.memory.index import Entry, Index
from polyrex.server.registry.names import Reference
from polyrex.server.registry.principal import OPERATOR, Principal
from polyrex.server.requests.cache_salt import CacheSalts
from reliability.result import Result
from support.engine_calls import started
from support.fake_server import FakeEngine, serving
from support.prefix_cache.isolation import Isolation, Salt, run_isolation
from support.prefix_cache.timing import Timing, compare_times
from support.random_inventory import make_task
from support.reliability.small_base import Routers, SmallBase
from support.tenants.isolation import ROUTES, Guessing, guess_at_tasks

CACHE = EmbeddedConfig(kv_cache_tokens=32 << 10, slots=64)
TASKS = 8
BY_CHANCE = 0.01
"""Times that differ more than this likely by chance tell something."""


def guesses(small: SmallBase, folder: Path, *, count: int, open_index: bool = False) -> Result:
    """Let a tenant send so many guesses at the names, versions, aliases and ids of another's tasks.

    `open_index`: a planted defect, the index does not look at who asks.
    """
    inventory = small.read_inventory()
    make = Routers(inventory)
    tokenizer = load_tokenizer(str(small.base))
    with ExitStack() as running:
        if open_index:
            running.enter_context(patch.object(Index, "find", _find_for_anybody(Index.find)))
        served = running.enter_context(
            serving(folder, inventory, tokenizer, FakeEngine(), lora_dir=folder)
        )
        found = guess_at_tasks(served.client, folder, (make(1), make(2)), count)
    return _guesses(found)


def _find_for_anybody(find: object) -> object:
    assert callable(find)

    def for_anybody(index: Index, asker: Principal, reference: Reference) -> Entry:
        owner = replace(OPERATOR, tenant=asker.tenant)
        entry: Entry = find(index, owner, reference)
        return entry

    return for_anybody


def _guesses(found: Guessing) -> Result:
    several = [route for route, answers in found.answers.items() if len(answers) != 1]
    others = {status for answers in found.answers.values() for status, _ in answers} - {404}
    figures = {
        "guesses": found.asked,
        "routes": len(found.answers),
        "routes with more than one answer": len(several),
        "statuses other than 404": len(others),
        "names that showed up elsewhere": len(found.leaks),
        "changes of the tasks": 0 if found.before == found.after else 1,
    }
    return Result(
        goal="guesses at the tasks of another tenant",
        length=f"{found.asked} guesses over {len(ROUTES)} routes",
        figures=figures,
        at_most=dict.fromkeys(list(figures)[2:], 0),
        at_least={"routes": len(ROUTES)},
        remarks=[*several, *map(str, found.leaks)],
    )


def cached_prefixes(small: SmallBase, *, pairs: int, salts: int, same_salt: bool = False) -> Result:
    """Let so many ordered pairs of askers send the same prompt, and adversaries so many salts.

    `same_salt`: a planted defect, the salt forgets the tenant.
    """
    found = asyncio.run(_isolation(small, pairs, salts, same_salt))
    figures = {
        "pairs": found.pairs,
        "salts": found.salts,
        "requests that found what another had cached": found.leaks,
        "answers that differ from those without a cache": found.deviations,
        "controls that found nothing": found.controls - found.hits,
        "controls": found.controls,
    }
    return Result(
        goal="nothing of another tenant is reused from the prefix cache",
        length=f"{found.pairs} pairs, {found.salts} salts",
        figures=figures,
        at_most=dict.fromkeys(list(figures)[2:5], 0),
        at_least={"pairs": pairs, "salts": salts, "controls": 1},
    )


async def _isolation(small: SmallBase, pairs: int, salts: int, same_salt: bool) -> Isolation:
    inventory, base = small.read_inventory(), str(small.base)
    tasks = [make_task(inventory, seed) for seed in range(TASKS)]
    salt = _salt(inventory, same_salt)
    plain = replace(CACHE, prefix_cache=False)
    async with (
        started(_engine(base, inventory, CACHE)) as engine,
        started(_engine(base, inventory, plain)) as reference,
    ):
        return await run_isolation(engine, reference, tasks, salt, pairs=pairs, salts=salts)


def times_of_prefixes(*, rounds: int, same_salt: bool = False) -> Result:
    """Compare the times of so many prompts that another tenant has asked with those of new ones.

    On the real base model, whose times a cached prefix shortens visibly. `same_salt`: as above.
    """
    found = asyncio.run(_times(rounds, same_salt))
    return Result(
        goal="the time to a first token tells nothing of another tenant's prompts",
        length=f"{rounds} prompts of each kind",
        figures={
            "likelihood of times across tenants by chance": found.across,
            "likelihood of times within a tenant by chance": found.within,
        },
        at_most={"likelihood of times within a tenant by chance": BY_CHANCE},
        at_least={"likelihood of times across tenants by chance": BY_CHANCE},
    )


async def _times(rounds: int, same_salt: bool) -> Timing:
    inventory = read_inventory(shipped_inventory(DEFAULT_BASE))
    async with started(_engine(resolve_base(DEFAULT_BASE), inventory, CACHE)) as engine:
        return await compare_times(engine, None, _salt(inventory, same_salt), rounds=rounds)


def _salt(inventory: Inventory, same: bool) -> Salt:
    real = CacheSalts(b"reliability" * 3, inventory.sha256).of

    def salt(tenant: str, router: str, own: str) -> str:
        return real("anybody" if same else tenant, router, own)

    return salt


def _engine(base: str, inventory: Inventory, config: EmbeddedConfig) -> EmbeddedEngine:
    return EmbeddedEngine(
        load_experts(inventory, load_base(base, torch.float32)), inventory, config
    )
