"""Decode steps from fixed buffers, padded, give the tokens of the plain path.

A recording here is the function itself, called again: all but the recording is as on a GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.packed_linear import pack_projections
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels import routing
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams
from polyrex.server.engines.embedded import decode_steps
from polyrex.server.engines.embedded.decode_steps import Record, Replay, rounded
from polyrex.server.engines.embedded.generation import Generation
from polyrex.server.engines.embedded.runner import ModelRunner
from support.engine_calls import Asked
from support.random_inventory import make_inventory, make_task
from support.small_model import SPECS, VOCABULARY, spec_id

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
SIZES = EmbeddedConfig(kv_cache_tokens=4096, slots=16, max_running=24, max_batch_tokens=128)
LENGTHS = (5, 40, 17, 3, 100, 31, 64, 16, 2, 9)

Ids = tuple[int, ...]


class Recorded:
    """Keeps what it is given to record, and calls it to replay it."""

    def __init__(self) -> None:
        self.functions: list[Replay] = []

    def __call__(self, function: Replay) -> Replay:
        self.functions.append(function)
        return function


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    with closing(asyncio.new_event_loop()) as loop:
        yield loop


@pytest.fixture
def inventory(small_base: str, tmp_path: Path) -> Inventory:
    return inventory_of(AdapterSpec("tensorpoly-2", rank=3, experts=4), small_base, tmp_path)


def inventory_of(spec: AdapterSpec, base: str, folder: Path) -> Inventory:
    return make_inventory(folder / "inventory.safetensors", base, spec)


def requests(tasks: Sequence[TaskVersion | None]) -> list[Asked]:
    """A request for each task, of very different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        (tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist()), task)
        for length, task in zip(LENGTHS, tasks, strict=False)
    ]


def runner_of(base: str, inventory: Inventory, record: Record | None) -> ModelRunner:
    adapted = load_experts(inventory, load_base(base, torch.float32))
    if record is not None:
        pack_projections(adapted.model)
    runner = ModelRunner(adapted, inventory, SIZES, record)
    runner._cache.pads_prompts = record is not None
    return runner


@torch.inference_mode()
def answers(
    runner: ModelRunner,
    asked: Sequence[Asked],
    loop: asyncio.AbstractEventLoop,
    sampling: SamplingParams = GREEDY,
) -> list[Ids]:
    """Run the requests to their end; half of them come after a few steps."""
    generations = [
        Generation(GenerationRequest("test", prompt, sampling, task), loop)
        for prompt, task in asked
    ]
    for generation in generations[::2]:
        runner.add(generation)
    for _ in range(5):
        runner.step()
    for generation in generations[1::2]:
        runner.add(generation)
    while not runner.idle:
        runner.step()
    return [
        tuple(generation.tokens[len(prompt) :])
        for generation, (prompt, _) in zip(generations, asked, strict=True)
    ]


@pytest.mark.parametrize("by_slot", [False, True], ids=["gathered", "by slot"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_method_answers_as_on_the_plain_path(
    spec: AdapterSpec,
    by_slot: bool,
    small_base: str,
    tmp_path: Path,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inventory = inventory_of(spec, small_base, tmp_path)
    tasks = [make_task(inventory, seed) for seed in range(3)]
    asked = requests([*tasks, None, None, *tasks[1:], None, *tasks[:2]])
    expected = answers(runner_of(small_base, inventory, None), asked, loop)
    monkeypatch.setattr(routing, "reads_by_slot", lambda _: by_slot)
    record = Recorded()
    assert answers(runner_of(small_base, inventory, record), asked, loop) == expected
    assert record.functions


def test_the_base_model_alone_answers_as_on_the_plain_path(
    small_base: str, inventory: Inventory, loop: asyncio.AbstractEventLoop
) -> None:
    asked = requests([None] * len(LENGTHS))
    expected = answers(runner_of(small_base, inventory, None), asked, loop)
    assert answers(runner_of(small_base, inventory, Recorded()), asked, loop) == expected


def test_seeds_draw_as_on_the_plain_path(
    small_base: str, inventory: Inventory, loop: asyncio.AbstractEventLoop
) -> None:
    asked, sampling = requests([None, make_task(inventory, 1)]), SamplingParams(20, seed=1)
    expected = answers(runner_of(small_base, inventory, None), asked, loop, sampling)
    assert answers(runner_of(small_base, inventory, Recorded()), asked, loop, sampling) == expected


def test_a_request_that_diverges_leaves_nothing_behind(
    small_base: str, inventory: Inventory, loop: asyncio.AbstractEventLoop
) -> None:
    task = make_task(inventory, 1)
    nan = torch.full_like(task.router.weights, float("nan"))
    diverging = TaskVersion(
        replace(task.info, router_sha256="nan"), replace(task.router, weights=nan)
    )
    runner = runner_of(small_base, inventory, Recorded())
    expected = answers(runner, requests([task, None, None, task, task]), loop)
    mixed = answers(runner, requests([task, None, diverging, task, task]), loop)
    assert not mixed[2]
    assert mixed[:2] + mixed[3:] == expected[:2] + expected[3:]
    assert answers(runner, requests([task, None, None, task, task]), loop) == expected
    assert not runner._cache.storage[:, :, 0].any()


def test_shapes_are_few_and_recorded_once(
    small_base: str, inventory: Inventory, loop: asyncio.AbstractEventLoop
) -> None:
    record = Recorded()
    runner = runner_of(small_base, inventory, record)
    asked = requests([None, make_task(inventory, 1)] * 5)
    answers(runner, asked, loop)
    before, steps = len(record.functions), runner.stats(0).steps
    answers(runner, asked, loop)
    assert len(record.functions) == before
    assert before < steps / 2


def test_a_replay_that_reads_old_inputs_is_noticed(
    small_base: str, inventory: Inventory, loop: asyncio.AbstractEventLoop
) -> None:
    def stale(function: Replay) -> Replay:
        function()
        return lambda: None

    asked = requests([None] * 3)
    expected = answers(runner_of(small_base, inventory, None), asked, loop)
    assert answers(runner_of(small_base, inventory, stale), asked, loop) != expected


def test_recordings_are_dropped_where_buffers_have_moved(
    small_base: str,
    inventory: Inventory,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = Recorded()
    runner = runner_of(small_base, inventory, record)
    asked = requests([make_task(inventory, 1)])
    answers(runner, asked, loop)
    before = len(record.functions)
    moved = runner._routing.generation + 1
    monkeypatch.setattr(type(runner._routing), "generation", moved)
    answers(runner, asked, loop)
    assert len(record.functions) == 2 * before


def test_recordings_are_dropped_where_another_engine_has_the_layers(
    small_base: str, inventory: Inventory, loop: asyncio.AbstractEventLoop
) -> None:
    adapted, record = load_experts(inventory, load_base(small_base, torch.float32)), Recorded()
    runner = ModelRunner(adapted, inventory, SIZES, record)
    asked = requests([make_task(inventory, 1), None])
    expected = answers(runner, asked, loop)
    before = len(record.functions)
    ModelRunner(adapted, inventory, SIZES)
    assert answers(runner, asked, loop) == expected
    assert len(record.functions) == 2 * before


def test_a_step_that_would_be_mostly_padding_runs_plainly(
    small_base: str,
    inventory: Inventory,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Asked] = [(tuple(range(300)), None), *(((1,), None) for _ in range(7))]
    expected = answers(runner_of(small_base, inventory, None), asked, loop)
    monkeypatch.setattr(decode_steps, "_ANYHOW", 0)
    monkeypatch.setattr(decode_steps, "_MOST_PADDING", 2)
    runner = runner_of(small_base, inventory, Recorded())
    assert answers(runner, asked, loop) == expected
    assert runner._decodes is not None
    assert {shape.blocks for shape in runner._decodes._replays} == {4}


def test_a_model_that_cannot_be_recorded_answers_all_the_same(
    small_base: str,
    inventory: Inventory,
    loop: asyncio.AbstractEventLoop,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unable(_: Replay) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")

    asked = requests([None, make_task(inventory, 1)])
    expected = answers(runner_of(small_base, inventory, None), asked, loop)
    assert answers(runner_of(small_base, inventory, unable), asked, loop) == expected
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "decode steps cannot be recorded, and run eagerly: "
        "operation not permitted when stream is capturing"
    ]


@pytest.mark.parametrize("by_slot", [False, True], ids=["gathered", "by slot"])
def test_what_is_recorded_at_start_serves_all_short_requests(
    by_slot: bool,
    small_base: str,
    inventory: Inventory,
    loop: asyncio.AbstractEventLoop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if by_slot:
        monkeypatch.setattr(routing, "reads_by_slot", lambda _: True)
    record = Recorded()
    runner = runner_of(small_base, inventory, record)
    with torch.inference_mode():
        runner.prepare()
    # 1, 2, 3, 4, 6, 8, 12, 16 and 24 requests, with and without adapters
    assert len(record.functions) == 18
    assert not runner.stats(0).adapter_steps
    short = [(prompt[:20], task) for prompt, task in requests([None, make_task(inventory, 1)] * 5)]
    expected = answers(runner_of(small_base, inventory, None), short, loop)
    assert answers(runner, short, loop) == expected
    assert len(record.functions) == 18
    longer = [(prompt * 3, task) for prompt, task in requests([make_task(inventory, 1)] * 3)]
    answers(runner, longer, loop)
    assert len(record.functions) > 18


def test_numbers_are_rounded_up_by_a_third_at_most() -> None:
    sizes = [rounded(count) for count in range(1, 1025)]
    assert sorted(set(sizes))[:9] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert all(count <= size <= 1.5 * count for count, size in enumerate(sizes, 1))
