"""The vLLM engine, the real one, against the embedded engine: greedy, float32, mixed batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import aclosing

import pytest

from polyrex.adapters.inventory import Inventory
from polyrex.adapters.registry import TaskVersion
from polyrex.server.config import VllmConfig
from polyrex.server.engines.base import Engine, GenerationRequest, SamplingParams
from polyrex.server.engines.embedded import EmbeddedEngine
from polyrex.server.engines.vllm_engine import VllmEngine, check_version
from polyrex.server.errors import EngineStopped, StartError

from .conftest import Answer, MakeTask, complete, prompt

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
TASKS, PROMPTS = 8, 20
Asked = tuple[tuple[int, ...], TaskVersion | None]


class Running:
    """A started engine with the event loop that it lives in."""

    def __init__(self, engine: VllmEngine, runner: asyncio.Runner) -> None:
        self.engine = engine
        self._runner = runner

    def answers(
        self,
        requests: Sequence[Asked],
        sampling: SamplingParams = GREEDY,
    ) -> list[Answer]:
        """All at once."""
        return self._runner.run(at_once(self.engine, requests, sampling))

    def abandon(self, tokens: tuple[int, ...], task: TaskVersion) -> None:
        """Go away after the first token of a long completion."""

        async def run() -> None:
            sampling = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
            request = GenerationRequest("abandoned", tokens, sampling, task)
            async with aclosing(self.engine.generate(request)) as chunks:
                async for _ in chunks:
                    return

        self._runner.run(run())


async def at_once(
    engine: Engine,
    requests: Sequence[Asked],
    sampling: SamplingParams = GREEDY,
) -> list[Answer]:
    return await asyncio.gather(
        *(complete(engine, tokens, task, sampling) for tokens, task in requests)
    )


@pytest.fixture(scope="module")
def vllm(base_path: str, random_inventory: Inventory) -> Iterator[Running]:
    """Five slots beside the base model's, so that they change hands."""
    config = VllmConfig(eager=True, max_context=1024, slots=6, kv_cache_bytes=1 << 29)
    with asyncio.Runner() as runner:
        engine = VllmEngine(base_path, random_inventory, config, "float32")
        runner.run(engine.start())
        yield Running(engine, runner)
        runner.run(engine.stop())
    with pytest.raises(EngineStopped):
        engine.check()


def test_same_tokens_as_the_embedded_engine(
    vllm: Running, engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    tasks: list[TaskVersion | None] = [None, *(make_task(seed) for seed in range(TASKS))]
    requests = [(prompt(number), task) for number in range(PROMPTS) for task in tasks]
    found = vllm.answers(requests)
    expected = asyncio.run(at_once(engine, requests))
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert vllm.engine.stats().slots_used == 0


def test_prefix_cache_tells_tasks_and_versions_apart(
    vllm: Running, engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    shared = prompt(1, 200)  # many whole blocks of the cache
    first, second, changed = (make_task(seed) for seed in (21, 22, 23))
    requests = [(shared, t) for t in (first, second, None, changed, first, None, second)]
    found = [vllm.answers([request])[0].ids for request in requests]
    expected = asyncio.run(at_once(engine, requests))
    assert found == [answer.ids for answer in expected]
    assert len(set(found)) > 2


def test_log_probabilities_are_those_of_the_embedded_engine(
    vllm: Running, engine: EmbeddedEngine, make_task: MakeTask
) -> None:
    sampling = SamplingParams(
        max_tokens=3, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1
    )
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


def test_abandoned_request_gives_its_slot_back(vllm: Running, make_task: MakeTask) -> None:
    vllm.abandon(prompt(4), make_task(31))
    assert vllm.engine.stats().slots_used == 0
    assert vllm.answers([(prompt(4), make_task(31))])[0].finish_reason == "length"


def test_unsupported_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyrex.server.engines.vllm_engine.SUPPORTED_VERSIONS", ("9.9",))
    with pytest.raises(StartError, match=r"polyrex works with vLLM 9\.9"):
        check_version()
