"""On vLLM too, nobody gets at what another tenant or another router left in the prefix cache."""

from __future__ import annotations

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
from support.prefix_cache.isolation import Isolation, Salt, run_isolation
from support.random_inventory import make_inventory, make_task
from support.running_vllm import Running, running_vllm
from support.small_model import VOCABULARY

LENGTH = 300  # two whole blocks of vLLM's cache on CPUs, and a rest


def prompt(seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (LENGTH,), generator=generator).tolist())


@pytest.fixture(scope="module")
def inventory(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    path: Path = tmp_path_factory.mktemp("inventory") / "inventory.safetensors"
    return make_inventory(path, small_base, AdapterSpec("tensorpoly-1", rank=3, experts=4))


@pytest.fixture(scope="module")
def vllm(small_base: str, inventory: Inventory) -> Iterator[Running]:
    with running_vllm(small_base, inventory) as running:
        yield running


@pytest.fixture(scope="module")
def reference(vllm: Running, small_base: str, inventory: Inventory) -> Iterator[EmbeddedEngine]:
    """An engine without a prefix cache."""
    config = EmbeddedConfig(kv_cache_tokens=4096, slots=16, prefix_cache=False)
    adapted = load_experts(inventory, load_base(small_base, torch.float32))
    engine = EmbeddedEngine(adapted, inventory, config)
    vllm.run(engine.start())
    yield engine
    vllm.run(engine.stop())


@pytest.fixture
def tasks(inventory: Inventory) -> list[TaskVersion]:
    """Different routers under one name, as different tenants may have them."""
    return [make_task(inventory, seed, "same-name") for seed in range(3)]


@pytest.fixture
def salt(inventory: Inventory) -> Salt:
    return CacheSalts(bytes(range(32)), inventory.sha256).of


def isolation(
    vllm: Running, reference: EmbeddedEngine, tasks: list[TaskVersion], salt: Salt
) -> Isolation:
    return vllm.run(
        run_isolation(vllm.engine, reference, tasks, salt, pairs=90, salts=60, length=LENGTH)
    )


def test_askers_find_what_they_have_computed_themselves_and_nothing_else(
    vllm: Running, reference: EmbeddedEngine, tasks: list[TaskVersion], salt: Salt
) -> None:
    before = vllm.engine.stats().prefix_hits
    found = isolation(vllm, reference, tasks, salt)
    assert found == Isolation(pairs=90, salts=60, leaks=0, deviations=0, controls=22, hits=22)
    assert vllm.engine.stats().prefix_hits - before == 22 * 256


def test_a_salt_without_the_tenant_is_noticed(
    vllm: Running, reference: EmbeddedEngine, tasks: list[TaskVersion], salt: Salt
) -> None:
    def wrong(_tenant: str, router: str, own: str) -> str:
        return salt("everybody", router, own)

    assert isolation(vllm, reference, tasks, wrong).leaks > 0


def test_a_salt_that_is_not_passed_on_is_noticed(
    vllm: Running,
    reference: EmbeddedEngine,
    tasks: list[TaskVersion],
    salt: Salt,
) -> None:
    assert isolation(vllm, reference, tasks, lambda *_: "").leaks > 0


def test_a_replaced_router_never_reads_what_the_old_one_cached(
    vllm: Running, reference: EmbeddedEngine, inventory: Inventory, salt: Salt
) -> None:
    async def ask(engine: EmbeddedEngine | None, task: TaskVersion) -> Answer:
        own = salt("acme", task.info.router_sha256, "")
        return await complete(engine or vllm.engine, prompt(9), task, GREEDY, own)

    tasks = [make_task(inventory, 100 + seed, "same-name") for seed in range(10)]
    for a, b in zip(tasks[::2], tasks[1::2], strict=True):
        for task, cached in ((a, 0), (b, 0), (a, 256)):
            found = vllm.run(ask(None, task))
            assert found.ids == vllm.run(ask(reference, task)).ids
            assert found.cached == cached


def test_salts_that_spell_an_adapter_do_not_open_its_cache(
    vllm: Running, tasks: list[TaskVersion]
) -> None:
    # vLLM #44701: names of adapters and salts were untagged strings of one list.
    router = tasks[0].info.router_sha256
    assert vllm.run(complete(vllm.engine, prompt(8), tasks[0])).cached == 0
    for spelled in (router, f"polyrex:{router}", f"('lora', '{router}')"):
        assert vllm.run(complete(vllm.engine, prompt(8), None, GREEDY, spelled)).cached == 0
    assert vllm.run(complete(vllm.engine, prompt(8), tasks[0])).cached == 256


def test_no_cache_outside_of_the_engine_is_connected(vllm: Running) -> None:
    # Their keys would have to tell routers and tenants apart as well (vLLM #44250).
    assert vllm.engine._engine is not None
    config = vllm.engine._engine.vllm_config
    assert config.kv_transfer_config is None
    assert config.cache_config.kv_offloading_size is None
    assert config.cache_config.enable_prefix_caching
