"""Decode steps of the embedded engine on the card: placed, without a wait, alike, and replayable.

In this process, the layers run on PyTorch's operators; `test_triton_interpreter.py` runs these
tests once more, with layers on the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyrex.adapters.files.inventory import (
    Inventory,
    load_experts,
    read_inventory,
    write_inventory,
)
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels import routing
from polyrex.kernels.routing import RoutingTable
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import EngineStats, GenerationRequest, SamplingParams
from polyrex.server.engines.embedded import runner as runner_module
from polyrex.server.engines.embedded.decode_steps import Record
from polyrex.server.engines.embedded.generation import Generation
from polyrex.server.engines.embedded.paged_cache import PagedCache
from polyrex.server.engines.embedded.runner import ModelRunner
from polyrex.server.engines.embedded.sampling import choose
from support.card_operators import CUDA
from support.placement import Card, HostSync, Launch, UnequalSteps, check_equal
from support.random_inventory import make_task, random_adapted
from support.small_model import SPECS, random_llama, spec_id

CPU = torch.device("cpu")
CONFIG = EmbeddedConfig(max_batch_tokens=64, max_running=4, slots=8, kv_cache_tokens=512)
MIXED = (None, 1, 2)
"""The tasks of three requests: the base model, and tasks by the seed of their router."""
GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=5, temperature=0.8, top_p=0.9, seed=3, ignore_eos=True)

EVERY_METHOD = pytest.mark.parametrize("spec", SPECS, ids=spec_id)
ONE_METHOD = pytest.mark.parametrize("spec", [AdapterSpec("poly", rank=3, experts=4)], ids=spec_id)


@pytest.fixture
def inventory(spec: AdapterSpec, tmp_path: Path) -> Inventory:
    path = tmp_path / "inventory.safetensors"
    write_inventory(path, random_adapted(spec, CPU))
    return read_inventory(path)


class Engine:
    """The runner of an embedded engine, and the requests that it was given."""

    def __init__(
        self, inventory: Inventory, device: torch.device, record: Record | None = None
    ) -> None:
        adapted = load_experts(inventory, random_llama().to(device))
        self._inventory = inventory
        self._requests: list[Generation] = []
        with torch.inference_mode():
            self._runner = ModelRunner(adapted, inventory, CONFIG, record)

    def add(self, seeds: Sequence[int | None], sampling: SamplingParams = GREEDY) -> None:
        """Run the prompts of one request for each task."""
        for number, seed in enumerate(seeds):
            self._add(tuple(range(3 + number, 8 + 2 * number)), seed, sampling)
        self.step()

    def add_prompts(self, prompts: Sequence[tuple[int, ...]], seed: int) -> None:
        """Run prompts of one task."""
        for prompt in prompts:
            self._add(prompt, seed, GREEDY)

    @property
    def stats(self) -> EngineStats:
        return self._runner.stats(0)

    def _add(self, prompt: tuple[int, ...], seed: int | None, sampling: SamplingParams) -> None:
        nobody: Any = None  # waits for the answers
        task = None if seed is None else make_task(self._inventory, seed)
        request = GenerationRequest("", prompt, sampling, task)
        self._requests.append(Generation(request, nobody))
        self._runner.add(self._requests[-1])

    def step(self) -> None:
        with torch.inference_mode():
            self._runner.step()

    def finish(self) -> list[list[int]]:
        """Run to the end, and return all tokens."""
        while not self._runner.idle:
            self.step()
        return [generation.tokens for generation in self._requests]


@pytest.fixture
def draws_may_wait(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the host wait once in a step, for the tokens that were drawn."""

    def choose_and_wait(logits: Tensor, draws: Any) -> Any:
        before = len(card.syncs)
        with card.sync_allowed():
            chosen = choose(logits, draws)
        if len(card.syncs) > before + 1:
            raise HostSync(f"{card.syncs[before:]}: one is enough")
        return chosen

    monkeypatch.setattr(runner_module, "choose", choose_and_wait)


def tokens_of(
    inventory: Inventory, device: torch.device, sampling: SamplingParams
) -> list[list[int]]:
    engine = Engine(inventory, device)
    engine.add(MIXED, sampling)
    return engine.finish()


@EVERY_METHOD
def test_tokens_are_those_of_the_cpu(card: Card, inventory: Inventory) -> None:
    found, expected = (tokens_of(inventory, device, GREEDY) for device in (CUDA, CPU))
    assert found == expected
    assert {len(own) for own in found} == {5 + 5, 6 + 5, 7 + 5}


@ONE_METHOD
def test_tokens_are_drawn_as_on_the_cpu(card: Card, inventory: Inventory) -> None:
    assert tokens_of(inventory, CUDA, DRAWN) == tokens_of(inventory, CPU, DRAWN)


@EVERY_METHOD
def test_prompts_that_begin_alike_get_the_tokens_of_the_cpu(
    card: Card, inventory: Inventory
) -> None:
    """On the card, prompts attend together, and those with a known prefix each for itself."""
    tokens = []
    for device in (CUDA, CPU):
        engine = Engine(inventory, device)
        for length in (20, 40, 33, 17):
            engine.add_prompts([tuple(range(length))] * 2, seed=1)
            engine.finish()
        tokens.append(engine.finish())
        assert engine.stats.prefix_hits == 2 * (16 + 32 + 16)
    assert tokens[0] == tokens[1]


def two_steps(
    card: Card, inventory: Inventory, sampling: SamplingParams
) -> tuple[list[Launch], list[Launch], int]:
    """The launches of two equal decode steps, and how often the host waited in both."""
    engine = Engine(inventory, CUDA)
    engine.add(MIXED, sampling)
    engine.step()  # the first one derives what it needs
    before = len(card.syncs)
    with card.decode_step() as first:
        engine.step()
    with card.decode_step() as second:
        engine.step()
    return first, second, len(card.syncs) - before


@EVERY_METHOD
@pytest.mark.usefixtures("draws_may_wait")
def test_equal_decode_steps_launch_the_same_and_wait_for_tokens_alone(
    card: Card, inventory: Inventory
) -> None:
    first, second, waits = two_steps(card, inventory, GREEDY)
    assert first
    assert waits == 2, "once a step, for the tokens"
    check_equal(first, second)


@ONE_METHOD
@pytest.mark.usefixtures("draws_may_wait")
def test_drawing_many_tokens_waits_once(card: Card, inventory: Inventory) -> None:
    first, second, waits = two_steps(card, inventory, DRAWN)
    assert first
    assert waits == 2, "once a step, for the tokens of all requests"
    check_equal(first, second)


def decode(card: Card, inventory: Inventory, seeds: Sequence[int]) -> list[Launch]:
    """The launches of a decode step of these tasks, whose states are there already."""
    engine = Engine(inventory, CUDA)
    engine.add(seeds)
    engine.step()
    with card.decode_step() as launches:
        engine.step()
    return launches


@EVERY_METHOD
@pytest.mark.usefixtures("draws_may_wait")
def test_steps_of_other_tasks_launch_the_same(card: Card, inventory: Inventory) -> None:
    """However many distinct tasks there are among as many requests."""
    check_equal(decode(card, inventory, (1, 1, 1)), decode(card, inventory, (2, 3, 4)))


@EVERY_METHOD
@pytest.mark.usefixtures("draws_may_wait")
def test_decode_steps_are_replayed_like_a_graph(card: Card, inventory: Inventory) -> None:
    """The tokens are those of the CPU, while tasks come and go."""
    tokens = []
    for device, record in ((CUDA, card.record), (CPU, None)):
        engine = Engine(inventory, device, record)
        engine.add(MIXED)
        engine.step()
        engine.add((3,))
        tokens.append(engine.finish())
    assert tokens[0] == tokens[1]


@ONE_METHOD
def test_a_number_read_in_a_step_is_caught(
    card: Card, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = PagedCache.plan

    def reading(*args: Any) -> Any:
        made = plan(*args)
        made.write.max().item()
        return made

    monkeypatch.setattr(PagedCache, "plan", reading)
    engine = Engine(inventory, CUDA)
    engine.add(MIXED)
    with card.decode_step(), pytest.raises(HostSync, match=r"_local_scalar_dense at .*test_engine"):
        engine.step()


@ONE_METHOD
@pytest.mark.usefixtures("draws_may_wait")
def test_allocations_by_the_number_of_distinct_tasks_are_caught(
    card: Card, inventory: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a table that gathers, as on the CPU, the rows of the tasks that occur."""
    step = RoutingTable.step

    def gather(self: Any, *args: Any) -> Any:
        self._gathered = None
        return step(self, *args)

    monkeypatch.setattr(routing, "reads_by_slot", lambda device: False)
    monkeypatch.setattr(RoutingTable, "step", gather)
    one, three = decode(card, inventory, (1, 1, 1)), decode(card, inventory, (2, 3, 4))
    with pytest.raises(UnequalSteps):
        check_equal(one, three)
