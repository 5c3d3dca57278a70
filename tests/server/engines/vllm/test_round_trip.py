"""Both engines give the trainer's log-probabilities, for every method, from the files it wrote."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import Inventory, load_experts, read_inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.rows import Row
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import SamplingParams
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.training.data.batches import Example
from polyrex.training.data.tasks import Task
from polyrex.training.loop.run import LoopConfig, run
from polyrex.training.model.multi_task import MultiTaskModel
from polyrex.training.train import write_results
from support.engine_calls import Answer, Asked, at_once, started
from support.running_vllm import Running, running_vllm
from support.small_model import SPECS, VOCABULARY, spec_id

INTUITION = AdapterSpec("trex", rank=3, rank_out=2, granularity="model", intuition=4)
ROUND_TRIPS = {spec_id(spec): spec for spec in SPECS} | {"trex-intuition": INTUITION}
TASKS = ("first", "second", "third")
FAST = LearningRates(experts=0.02, gates=0.1, routing=1.0, token_routers=0.05)
"""So high that a few steps change every parameter. T-REX multiplies its gates by 100."""
TOLERANCE = 1e-4
SCORED = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)


@dataclass(frozen=True)
class Trained:
    """What a trainer wrote, and the log-probabilities of its model with each task."""

    inventory: Inventory
    tasks: Mapping[str | None, TaskVersion | None]  # None: the base model
    logprobs: Mapping[str | None, list[Tensor]]  # for each prompt, of its tokens but the first


def prompt(seed: int) -> tuple[int, ...]:
    """Random tokens; the length grows with the seed, from 9."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (9 + 4 * seed,), generator=generator).tolist())


PROMPTS = tuple(prompt(seed) for seed in range(4))


def train(base_path: str, spec: AdapterSpec, folder: Path) -> Trained:
    """Train for six steps, and write the results in float32."""
    model = MultiTaskModel(attached(base_path, spec), len(TASKS), seed=0)
    examples = [
        Example(task, prompt(10 * task + n)[:9], prompt(100 + 10 * task + n)[:3])
        for task in range(len(TASKS))
        for n in range(4)
    ]
    rates = replace(FAST, gates=0.001) if spec.method == "trex" else FAST
    loop = LoopConfig(steps=6, batch_rows=12, warmup=1, rates=rates)
    run(model, model.parameter_groups(), examples, loop, pad=0, progress=lambda _: None)
    row = Row("input", "answer", None)
    write_results(
        folder,
        model,
        [
            Task(name, "", "exact_match", "", "", "", {"train": (row,), "test": ()})
            for name in TASKS
        ],
        torch.float32,
    )
    inventory = read_inventory(folder / "inventory.safetensors")
    logprobs: dict[str | None, list[Tensor]] = {None: [said(model, ids) for ids in PROMPTS]}
    for number, name in enumerate(TASKS):
        one = model.logits[number : number + 1], torch.zeros(1, dtype=torch.int64)
        with model.routed(*one):
            logprobs[name] = [said(model, ids) for ids in PROMPTS]
    tasks: dict[str | None, TaskVersion | None] = {name: read(inventory, name) for name in TASKS}
    return Trained(inventory, {None: None, **tasks}, logprobs)


def attached(base_path: str, spec: AdapterSpec) -> AdaptedModel:
    base = load_base(base_path, torch.float32)
    intuition = None
    if spec.intuition:
        centroids = torch.eye(spec.intuition, 5)
        identity = EncoderIdentity("none", 5, "0" * 64)
        intuition = Intuition(centroids, identity, spec.gates)
        intuition.reset(torch.Generator().manual_seed(1))
    return attach(base, spec, find_targets(base), seed=0, intuition=intuition)


@torch.no_grad()
def said(model: MultiTaskModel, ids: tuple[int, ...]) -> Tensor:
    """Log-probabilities of a prompt's tokens but the first, under the model's routing."""
    found = model.adapted.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return torch.stack([found[at, token] for at, token in enumerate(ids[1:])])


def read(inventory: Inventory, name: str) -> TaskVersion:
    return Bundle(inventory).task(name)


@pytest.fixture(scope="module")
def trained(small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Trains with a method by name, once: `trained("lora")`."""
    known: dict[str, Trained] = {}

    def find(name: str) -> Trained:
        if name not in known:
            folder: Path = tmp_path_factory.mktemp(name)
            known[name] = train(small_base, ROUND_TRIPS[name], folder)
        return known[name]

    return find


def check(answers: list[Answer], trained: Trained) -> None:
    """Compare every prompt under every task; tasks differ, so that a wrong one is noticed."""
    names = list(trained.tasks)
    expected = {name: torch.cat(trained.logprobs[name]) for name in names}
    per_task = len(PROMPTS)
    for number, name in enumerate(names):
        own = answers[number * per_task : (number + 1) * per_task]
        tokens = [token for answer in own for token in (answer.prompt or ())[1:]]
        found = torch.tensor([token.logprob for token in tokens])
        torch.testing.assert_close(found, expected[name], rtol=0, atol=TOLERANCE)
    one_adapter = not trained.inventory.routing_shape[1]
    for name in names[1:]:
        others = {None} if one_adapter else {*names} - {name}
        for other in others:
            assert (expected[name] - expected[other]).abs().max() > 100 * TOLERANCE


def asked(trained: Trained) -> list[Asked]:
    return [(ids, task) for task in trained.tasks.values() for ids in PROMPTS]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_embedded_engine_serves_what_was_trained(
    small_base: str, trained: Callable[[str], Trained], name: str
) -> None:
    async def ask(found: Trained) -> list[Answer]:
        adapted = load_experts(found.inventory, load_base(small_base, torch.float32))
        config = EmbeddedConfig(kv_cache_tokens=4096, slots=16)
        engine = EmbeddedEngine(adapted, found.inventory, config)
        async with started(engine):
            return await at_once(engine, asked(found), SCORED)

    check(asyncio.run(ask(trained(name))), trained(name))


@pytest.fixture(scope="module")
def vllm(small_base: str, trained: Callable[[str], Trained]) -> Iterator[Running]:
    with running_vllm(small_base, trained("lora").inventory) as running:
        yield running


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_vllm_serves_what_was_trained(
    vllm: Running, trained: Callable[[str], Trained], name: str
) -> None:
    vllm.adapt(trained(name).inventory)
    found = vllm.answers(asked(trained(name)), replace(SCORED, max_tokens=1))
    check(found, trained(name))
