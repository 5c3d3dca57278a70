"""Every method on vLLM with the real base model: `make test-vllm-full`, about half an hour.

Writes its figures to tests/results/vllm_same_tokens.json.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import SamplingParams, Token
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from support.engine_calls import Answer, Asked, at_once, prompt, started
from support.random_inventory import make_inventory, make_task
from support.running_vllm import Running, running_vllm
from support.small_model import spec_id

pytestmark = pytest.mark.full

SPECS = {
    AdapterSpec("lora", rank=16): 1.0,
    AdapterSpec("poly", rank=16, experts=8): 5.0,
    AdapterSpec("mhr", rank=16, experts=8, splits=3): 5.0,
    AdapterSpec("tlora", rank=16): 0.05,
    AdapterSpec("tensorpoly-1", rank=16, experts=8): 0.2,
    AdapterSpec("tensorpoly-2", rank=16, experts=8): 0.05,
    AdapterSpec("tensorpoly-x", rank=16, experts=4): 0.1,
    AdapterSpec("trex", rank=16, form="static"): 0.02,
    AdapterSpec("trex", rank=16, form="mix"): 0.0025,
    AdapterSpec("trex", rank=16, form="diagonal"): 0.01,
    AdapterSpec("molora", rank=4, experts=8): 0.3,
    AdapterSpec("sira", rank=4, experts=8): 0.3,
}
"""Specs with the spread of their random experts. It changes log-probabilities of a text by about
a half, as trained experts do. Far larger experts would amplify any rounding error."""
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SCORED = replace(GREEDY, max_tokens=0, prompt_logprobs=0)
TASKS, PROMPTS = 8, 20
TEXTS = (
    "The capital of France is Paris, a city on the river Seine with about two million people. It "
    "has been the centre of government since the tenth century, and most of the country's railways "
    "and roads meet there. Visitors come to see the Eiffel Tower, the Louvre and the cathedral.",
    "Question: A farmer has 17 sheep and buys 5 more; then 3 of them run away. How many are left? "
    "Answer: 17 and 5 are 22, and 22 less 3 is 19, so there are 19 sheep left. Question: What is "
    "the opposite of hot? Answer: cold. Question: Which animal barks? Answer: a dog.",
)
RESULTS = Path(__file__).parents[3] / "results" / "vllm_same_tokens.json"
Embedded = Callable[[AdapterSpec, torch.dtype, SamplingParams], list[Answer]]
Found = dict[str, dict[str, Any]]
Compared = Callable[[Running, AdapterSpec], dict[str, float]]


def requests(inventory: Inventory, sampling: SamplingParams) -> list[Asked]:
    """Requests of the base model and of eight tasks."""
    tasks = [None, *(make_task(inventory, seed) for seed in range(TASKS))]
    prompts = [prompt(number) for number in range(PROMPTS)]
    if sampling is SCORED:
        tokenizer = load_tokenizer(resolve_base(DEFAULT_BASE))
        prompts = [tuple(tokenizer.encode(text)) for text in TEXTS]
    return [(tokens, task) for task in tasks for tokens in prompts]


def logprobs(answers: list[Answer]) -> Tensor:
    """[1 + TASKS, tokens], the base model's first: those of every prompt token that has one."""
    scored: list[tuple[Token, ...]] = [answer.prompt or () for answer in answers]
    found = [token.logprob for each in scored for token in each if token.logprob is not None]
    return torch.tensor(found, dtype=torch.float64).view(1 + TASKS, -1)


def compare(ours: Tensor, theirs: Tensor, exact: Tensor) -> dict[str, float]:
    """Differences of log-probabilities: two engines in bfloat16, and one of them in float32."""
    apart = (ours - theirs).abs()
    return {
        "tokens": ours.numel(),
        "of the mean": abs(float((ours - theirs).mean())),
        "without adapters": float(apart[0].mean()),
        "with adapters": float(apart[1:].mean()),
        "embedded from float32": float((theirs - exact)[1:].abs().mean()),
        "vLLM from float32": float((ours - exact)[1:].abs().mean()),
        "adapters' own part, float32": float((exact[1:] - exact[:1]).abs().mean()),
    }


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    """Figures by method and name; they are written at the end, even if tests failed.

    Figures of an earlier run that this one does not measure again are kept.
    """
    found: Found = {spec_id(spec): {} for spec in SPECS}
    if RESULTS.exists():
        found |= json.loads(RESULTS.read_text())
    yield found
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module")
def inventories(
    base_path: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[AdapterSpec, Inventory]:
    folder: Path = tmp_path_factory.mktemp("inventories")
    return {
        spec: make_inventory(folder / f"{spec_id(spec)}.safetensors", base_path, spec, spread)
        for spec, spread in SPECS.items()
    }


@pytest.fixture(scope="module")
def embedded(base_path: str, inventories: dict[AdapterSpec, Inventory]) -> Embedded:
    @cache
    def run(spec: AdapterSpec, dtype: torch.dtype, sampling: SamplingParams) -> list[Answer]:
        inventory = inventories[spec]
        adapted = load_experts(inventory, load_base(base_path, dtype))

        async def ask() -> list[Answer]:
            config = EmbeddedConfig(kv_cache_tokens=8192, slots=64)
            async with started(EmbeddedEngine(adapted, inventory, config)) as engine:
                return await at_once(engine, requests(inventory, sampling), sampling)

        return asyncio.run(ask())

    return run


@pytest.fixture(scope="module")
def vllm(
    request: pytest.FixtureRequest, base_path: str, inventories: dict[AdapterSpec, Inventory]
) -> Iterator[tuple[str, Running]]:
    dtype, _, mode = request.param.partition("-")
    sizes = {"eager": mode == "eager", "kv_cache_bytes": 1 << 29, "max_batch_tokens": 256}
    with running_vllm(base_path, next(iter(inventories.values())), dtype, **sizes) as running:
        yield request.param, running


@pytest.fixture(scope="module")
def compared(
    embedded: Embedded, inventories: dict[AdapterSpec, Inventory], found: Found
) -> Compared:
    """Compares log-probabilities in bfloat16, once per method."""

    @cache
    def run(running: Running, spec: AdapterSpec) -> dict[str, float]:
        running.adapt(inventories[spec])
        asked = requests(inventories[spec], SCORED)
        result = found[spec_id(spec)]["bfloat16 log-probabilities"] = compare(
            logprobs(running.answers(asked, SCORED)),
            logprobs(embedded(spec, torch.bfloat16, SCORED)),
            logprobs(embedded(spec, torch.float32, SCORED)),
        )
        return result

    return run


@pytest.mark.parametrize("vllm", ["float32-eager", "float32-compiled"], indirect=True)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_method_says_what_the_embedded_engine_says(
    vllm: tuple[str, Running],
    embedded: Embedded,
    inventories: dict[AdapterSpec, Inventory],
    found: Found,
    spec: AdapterSpec,
) -> None:
    mode, running = vllm
    running.adapt(inventories[spec])
    asked = requests(inventories[spec], GREEDY)
    right = embedded(spec, torch.float32, GREEDY)
    answers = running.answers(asked, GREEDY)
    same = sum(one.ids == other.ids for one, other in zip(answers, right, strict=True))
    found[spec_id(spec)][f"{mode} same completions"] = [same, len(asked)]
    assert same == len(asked)


@pytest.mark.parametrize("vllm", ["bfloat16-eager"], indirect=True)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
class TestBfloat16:
    """Log-probabilities of texts."""

    @pytest.mark.xfail(
        strict=True,
        reason="the engines round the base model's logits 0.045 apart, without adapters",
    )
    def test_engines_are_within_a_hundredth(
        self, vllm: tuple[str, Running], compared: Compared, spec: AdapterSpec
    ) -> None:
        assert compared(vllm[1], spec)["with adapters"] < 1e-2

    def test_adapters_add_nothing_to_what_rounding_does(
        self, vllm: tuple[str, Running], compared: Compared, spec: AdapterSpec
    ) -> None:
        found = compared(vllm[1], spec)
        assert found["of the mean"] < 1e-2
        assert found["with adapters"] < 1.25 * found["without adapters"]
        assert found["vLLM from float32"] < 1.25 * found["embedded from float32"]
        assert found["adapters' own part, float32"] > 4 * found["with adapters"]
