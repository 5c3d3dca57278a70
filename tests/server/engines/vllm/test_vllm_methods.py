"""vLLM, compiled and on two ranks, gives the embedded engine's answers on a small model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import SamplingParams
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from support.engine_calls import Answer, Asked, at_once, started
from support.random_inventory import make_inventory, make_task
from support.running_vllm import Running, cached_tokens, running_vllm
from support.small_model import SPECS, VOCABULARY, spec_id

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TASKS, PROMPTS = 8, 20
Prompt = tuple[int, ...]
Inventories = dict[AdapterSpec, Inventory]
Embedded = Callable[[AdapterSpec, tuple[Asked, ...]], list[Answer]]


def prompt(seed: int, length: int | None = None) -> Prompt:
    """Random tokens, 3 to 98 of them; those of seeds 2k and 2k + 1 begin alike."""
    generator = torch.Generator().manual_seed(seed // 2)
    length = length or 3 + 5 * seed
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


SHARED = prompt(1, 300)  # two whole blocks of vLLM's cache on CPUs, and a rest
ROUTED = next(spec for spec in SPECS if spec.method == "tensorpoly-1")


@pytest.fixture(scope="module")
def inventories(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Inventories:
    folder: Path = tmp_path_factory.mktemp("inventories")
    return {
        spec: make_inventory(folder / f"{spec_id(spec)}.safetensors", small_base, spec)
        for spec in SPECS
    }


@pytest.fixture(scope="module")
def embedded(small_base: str, inventories: Inventories) -> Embedded:
    """Answers of the embedded engine with a method's inventory, computed once."""

    async def ask(
        adapted: AdaptedModel, inventory: Inventory, asked: tuple[Asked, ...]
    ) -> list[Answer]:
        config = EmbeddedConfig(kv_cache_tokens=8192, slots=64)
        async with started(EmbeddedEngine(adapted, inventory, config)) as engine:
            return await at_once(engine, asked, GREEDY)

    known: dict[tuple[AdapterSpec, tuple[tuple[Prompt, str | None], ...]], list[Answer]] = {}

    def run(spec: AdapterSpec, asked: tuple[Asked, ...]) -> list[Answer]:
        key = spec, tuple((ids, task.info.router_sha256 if task else None) for ids, task in asked)
        if key not in known:
            adapted = load_experts(inventories[spec], load_base(small_base, torch.float32))
            known[key] = asyncio.run(ask(adapted, inventories[spec], asked))
        return known[key]

    return run


@pytest.fixture(
    scope="module",
    params=[{"eager": False}, {"tensor_parallel": 2}],
    ids=["compiled", "two ranks"],
)
def vllm(
    request: pytest.FixtureRequest, small_base: str, inventories: Inventories
) -> Iterator[Running]:
    with running_vllm(small_base, inventories[SPECS[0]], **request.param) as running:
        yield running


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_method_gives_the_tokens_of_the_embedded_engine(
    vllm: Running, embedded: Embedded, inventories: Inventories, spec: AdapterSpec
) -> None:
    tasks = [None, *(make_task(inventories[spec], seed) for seed in range(TASKS))]
    asked = tuple((prompt(number), task) for number in range(PROMPTS) for task in tasks)
    right = embedded(spec, asked)
    vllm.adapt(inventories[spec])
    found = vllm.answers(asked, GREEDY)
    assert sum(one.ids != other.ids for one, other in zip(found, right, strict=True)) == 0
    # Answers of the base model, or of another task, would be noticed.
    base, first, second = ([answer.ids for answer in right[k :: TASKS + 1]] for k in range(3))
    assert first != base
    assert method_class(spec.method).routing_size(spec) == 0 or first != second


def test_the_model_is_compiled_where_it_should_be(vllm: Running) -> None:
    found = vllm.in_workers(lambda worker: worker.model_runner.model.model.do_not_compile)
    assert found == [vllm.engine._arguments.enforce_eager] * len(found)


@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.full)])
def test_a_replaced_router_never_reads_what_the_old_one_cached(
    vllm: Running, embedded: Embedded, inventories: Inventories, rounds: int
) -> None:
    # One name throughout, and slots that change hands; A, B, then A again.
    tasks = [
        make_task(inventories[ROUTED], 1000 * rounds + n, "same-name") for n in range(2 * rounds)
    ]
    asked = tuple((SHARED, task) for task in tasks)
    right = [answer.ids for answer in embedded(ROUTED, asked)]
    vllm.adapt(inventories[ROUTED])
    assert len(set(right)) > rounds
    for a in range(0, 2 * rounds, 2):
        for number, cold in ((a, True), (a + 1, True), (a, False)):
            with cached_tokens() as cached:
                (answer,) = vllm.answers([asked[number]], GREEDY)
            assert answer.ids == right[number]
            assert (max(cached) == 0) == cold


def test_routers_under_one_name_keep_apart_in_one_batch(
    vllm: Running, embedded: Embedded, inventories: Inventories
) -> None:
    tasks = [make_task(inventories[ROUTED], 200 + n, "same-name") for n in range(40)]
    asked = tuple((SHARED, task) for task in tasks)
    right = embedded(ROUTED, asked)
    vllm.adapt(inventories[ROUTED])
    for _ in range(2):  # the second time from the cache, in other slots
        assert [a.ids for a in vllm.answers(asked, GREEDY)] == [a.ids for a in right]


def test_no_name_opens_the_cache_of_another_task(
    vllm: Running, embedded: Embedded, inventories: Inventories
) -> None:
    task = make_task(inventories[ROUTED], 300)
    sha256 = task.info.router_sha256
    names = (sha256, f"polyrex:{sha256}", f"('lora', '{sha256}', 'polyrex:{sha256}')")
    others = [make_task(inventories[ROUTED], 301 + n, name) for n, name in enumerate(names)]
    mine = prompt(19)[:40] + SHARED  # that no test has cached
    asked: tuple[Asked, ...] = tuple((mine, t) for t in (task, *others, None, task))
    right = embedded(ROUTED, asked)
    vllm.adapt(inventories[ROUTED])
    for number, request in enumerate(asked):
        with cached_tokens() as cached:
            (answer,) = vllm.answers([request], GREEDY)
        assert answer.ids == right[number].ids
        assert (max(cached) == 0) == (number < len(asked) - 1)
