"""Nobody gets at what another tenant, or another router, has left in the prefix cache.

tests/server/engines/vllm/test_vllm_cache_salt.py has the same for vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.requests.cache_salt import CacheSalts
from support.engine_calls import GREEDY, Answer, complete
from support.prefix_cache.isolation import (
    Asker,
    Isolation,
    Salt,
    adversarial_salts,
    run_isolation,
)
from support.prefix_cache.timing import compare_times
from support.random_inventory import make_inventory, make_task
from support.small_model import VOCABULARY

SECRET = bytes(range(32))
SIZES = EmbeddedConfig(kv_cache_tokens=4096, slots=16)


def prompt(seed: int, length: int = 40) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


@pytest.fixture(scope="module")
def inventory(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    path: Path = tmp_path_factory.mktemp("inventory") / "inventory.safetensors"
    return make_inventory(path, small_base, AdapterSpec("tensorpoly-1", rank=3, experts=4))


@pytest.fixture(scope="module")
def tasks(inventory: Inventory) -> list[TaskVersion]:
    """Different routers under one name, as different tenants may have them."""
    return [make_task(inventory, seed, "same-name") for seed in range(4)]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def started(
    runner: asyncio.Runner, base: str, inventory: Inventory, config: EmbeddedConfig
) -> Iterator[EmbeddedEngine]:
    adapted = load_experts(inventory, load_base(base, torch.float32))
    engine = EmbeddedEngine(adapted, inventory, config)
    runner.run(engine.start())
    yield engine
    runner.run(engine.stop())


@pytest.fixture
def engine(
    runner: asyncio.Runner, small_base: str, inventory: Inventory
) -> Iterator[EmbeddedEngine]:
    yield from started(runner, small_base, inventory, SIZES)


@pytest.fixture(scope="module")
def reference(
    runner: asyncio.Runner, small_base: str, inventory: Inventory
) -> Iterator[EmbeddedEngine]:
    """An engine without a prefix cache."""
    config = EmbeddedConfig(kv_cache_tokens=4096, slots=16, prefix_cache=False)
    yield from started(runner, small_base, inventory, config)


@pytest.fixture
def salt(inventory: Inventory) -> Salt:
    return CacheSalts(SECRET, inventory.sha256).of


def test_a_replaced_router_never_reads_what_the_old_one_cached(
    runner: asyncio.Runner,
    engine: EmbeddedEngine,
    reference: EmbeddedEngine,
    inventory: Inventory,
    salt: Salt,
) -> None:
    async def ask(engine: EmbeddedEngine, task: TaskVersion) -> Answer:
        own = salt("acme", task.info.router_sha256, "")
        return await complete(engine, prompt(1), task, GREEDY, own)

    # One name throughout; A, B, then A again, then the next two.
    tasks = [make_task(inventory, 100 + seed, "same-name") for seed in range(40)]
    for a, b in zip(tasks[::2], tasks[1::2], strict=True):
        for task, cached in ((a, 0), (b, 0), (a, 32)):
            found = runner.run(ask(engine, task))
            assert found.ids == runner.run(ask(reference, task)).ids
            assert found.cached == cached


def isolation(
    runner: asyncio.Runner,
    engines: tuple[EmbeddedEngine, EmbeddedEngine],
    tasks: list[TaskVersion],
    salt: Salt,
) -> Isolation:
    return runner.run(run_isolation(*engines, tasks, salt, pairs=600, salts=200))


def test_askers_find_what_they_have_computed_themselves_and_nothing_else(
    runner: asyncio.Runner,
    engine: EmbeddedEngine,
    reference: EmbeddedEngine,
    tasks: list[TaskVersion],
    salt: Salt,
) -> None:
    found = isolation(runner, (engine, reference), tasks, salt)
    assert found == Isolation(pairs=600, salts=200, leaks=0, deviations=0, controls=54, hits=54)


@pytest.mark.parametrize(
    "forgotten",
    ["tenant", "the client's own salt is passed on", "fields run into each other"],
)
def test_a_salt_that_forgets_something_is_noticed(
    runner: asyncio.Runner,
    engine: EmbeddedEngine,
    reference: EmbeddedEngine,
    tasks: list[TaskVersion],
    salt: Salt,
    forgotten: str,
) -> None:
    def wrong(tenant: str, router: str, own: str) -> str:
        if forgotten == "tenant":
            return salt("", router, own)
        if forgotten == "fields run into each other":
            return salt(tenant + own, router, "")
        return own or salt(tenant, router, "")

    assert isolation(runner, (engine, reference), tasks, wrong).leaks > 0


def test_the_engine_keeps_routers_apart_even_without_salts(
    runner: asyncio.Runner,
    engine: EmbeddedEngine,
    reference: EmbeddedEngine,
    tasks: list[TaskVersion],
) -> None:
    for task in (*tasks, None):
        found = runner.run(complete(engine, prompt(1), task))
        assert found.cached == 0
        assert found.ids == runner.run(complete(reference, prompt(1), task)).ids
    # A salt that is the router's own name, before a request to the base model: vLLM #44701.
    router = tasks[0].info.router_sha256
    for spelled in (router, f"64:{router}", f"{router}:"):
        assert runner.run(complete(engine, prompt(1), None, GREEDY, spelled)).cached == 0


def test_prompts_are_timed_with_hits_of_their_own_tenant_alone(
    runner: asyncio.Runner, engine: EmbeddedEngine, salt: Salt, tasks: list[TaskVersion]
) -> None:
    # What the times tell wants a quiet machine: `make reliability` looks at it.
    before = engine.stats().prefix_hits
    found = runner.run(compare_times(engine, tasks[0], salt, rounds=5, length=40))
    assert found.rounds == 5
    assert engine.stats().prefix_hits - before == 5 * 32


def test_salts_are_the_same_for_replicas_and_differ_by_every_field(inventory: Inventory) -> None:
    fields = list(itertools.product(("a", "ab", ""), ("", "b", "bc"), ("", "c", "bc")))
    made = {CacheSalts(SECRET, inventory.sha256).of(*each) for each in fields}
    assert made == {CacheSalts(SECRET, inventory.sha256).of(*each) for each in fields}
    assert len(made) == len(fields)
    assert all(len(salt) == 64 for salt in made)
    others = {CacheSalts(SECRET, "other").of(*each) for each in fields}
    others |= {CacheSalts(b"other", inventory.sha256).of(*each) for each in fields}
    assert len(made | others) == 3 * len(fields)


def test_the_scheme_of_salts_is_what_it_was() -> None:
    # Another scheme needs another number: replicas of two releases may share a registry.
    expected = "aae667796b6d8174f6974b03a1a63562d9cbe93ddcc684a760cd02a8d36a673f"
    assert CacheSalts(SECRET, "inventory").of("tenant", "router", "own") == expected


def test_adversarial_salts_differ(tasks: list[TaskVersion], salt: Salt) -> None:
    guesses = adversarial_salts(Asker("tenant-0", tasks[0]), tasks, salt, 5000)
    assert len(set(guesses)) == 5000
    assert salt("tenant-0", tasks[0].info.router_sha256, "") in guesses
