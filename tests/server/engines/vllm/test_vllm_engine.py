"""The vLLM engine agrees with the embedded engine: real base model, float32, mixed batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.server.engines.base import SamplingParams
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from support.engine_calls import MakeTask, at_once, prompt
from support.running_vllm import Running, running_vllm

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TASKS, PROMPTS = 8, 20


@pytest.fixture(scope="module")
def vllm(base_path: str, random_inventory: Inventory) -> Iterator[Running]:
    with running_vllm(
        base_path, random_inventory, max_batch_tokens=256, kv_cache_bytes=1 << 29
    ) as running:
        yield running


def test_same_tokens_as_the_embedded_engine(
    vllm: Running, engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    tasks: list[TaskVersion | None] = [None, *(make_task(seed) for seed in range(TASKS))]
    requests = [(prompt(number), task) for number in range(PROMPTS) for task in tasks]
    found = vllm.answers(requests, GREEDY)
    expected = asyncio.run(at_once(engine, requests, GREEDY))
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert vllm.engine.stats().slots_used == 0


def test_log_probabilities_are_those_of_the_embedded_engine(
    vllm: Running, engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    sampling = replace(GREEDY, max_tokens=3, logprobs=2, prompt_logprobs=1)
    requests = [(prompt(3), make_task(1))]
    (found,) = vllm.answers(requests, sampling)
    (expected,) = asyncio.run(at_once(engine, requests, sampling))
    assert found.prompt is not None
    assert expected.prompt is not None
    for one, other in zip(
        found.tokens + found.prompt, expected.tokens + expected.prompt, strict=True
    ):
        assert one.id == other.id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [id for id, _ in one.top] == [id for id, _ in other.top]


def test_a_seed_repeats_whichever_it_is(vllm: Running, make_task: MakeTask) -> None:
    for seed in (-1, 0, 2**63 - 1, -(2**63)):
        sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=seed, ignore_eos=True)
        first, second = vllm.answers([(prompt(5), make_task(1))] * 2, sampling)
        assert first.ids == second.ids


def test_abandoned_request_gives_its_slot_back(vllm: Running, make_task: MakeTask) -> None:
    vllm.abandon(prompt(4), make_task(31))
    assert vllm.engine.stats().slots_used == 0
    assert vllm.answers([(prompt(4), make_task(31))], GREEDY)[0].finish_reason == "length"
