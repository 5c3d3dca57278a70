"""A runner of the embedded engine, step by step in the caller's own thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.base_model import load_base
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams, Token, TokenChunk
from polyrex.server.engines.embedded.generation import Generation
from polyrex.server.engines.embedded.runner import ModelRunner
from support.small_model import VOCABULARY

Ids = tuple[int, ...]

SIZES = EmbeddedConfig(kv_cache_tokens=2048, slots=16, max_running=16, max_batch_tokens=64)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, logprobs=1, ignore_eos=True)
TOLERANCE = 1e-4


def tokens(seed: int, count: int) -> Ids:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (count,), generator=generator).tolist())


@dataclass(frozen=True)
class Asked:
    """A request, before a runner has it."""

    prompt: Ids
    task: TaskVersion | None = None
    salt: str = "salt"
    sampling: SamplingParams = GREEDY


@dataclass(frozen=True)
class Answer:
    """A whole completion, or the error that it ended with."""

    tokens: tuple[Token, ...]
    cached: int
    prompt: tuple[Token, ...] | None = None
    error: Exception | None = None

    @property
    def ids(self) -> Ids:
        return tuple(token.id for token in self.tokens)

    @property
    def logprobs(self) -> list[float | None]:
        """Those of the completion, and then those of the prompt but for its first token."""
        return [token.logprob for token in (*self.tokens, *(self.prompt or ())[1:])]


class Runner:
    """A runner, and what the requests get that it was given."""

    def __init__(self, base: str, inventory: Inventory, **sizes: Any) -> None:
        adapted = load_experts(inventory, load_base(base, torch.float32))
        self.runner = ModelRunner(adapted, inventory, replace(SIZES, **sizes))
        self._asked: list[Generation] = []
        self._outcomes: dict[Generation, list[TokenChunk | Exception]] = {}

    def begin(self, asked: Asked) -> Generation:
        nobody: Any = None  # waits for the answers
        request = GenerationRequest("test", asked.prompt, asked.sampling, asked.task, asked.salt)
        generation = Generation(request, nobody)
        self._outcomes[generation] = []
        self.runner.add(generation)
        return generation

    def steps(self, count: int = 10_000) -> None:
        with torch.inference_mode():
            while count and not self.runner.idle:
                self.runner.step()
                count -= 1
        for generation, outcome in self.runner.take_deliveries():
            self._outcomes[generation].append(outcome)

    def answer(self, generation: Generation) -> Answer:
        outcomes = self._outcomes[generation]
        chunks = [one for one in outcomes if isinstance(one, TokenChunk)]
        error = next((one for one in outcomes if isinstance(one, Exception)), None)
        drawn = tuple(token for chunk in chunks for token in chunk.tokens)
        prompt = chunks[0].prompt if chunks else None
        return Answer(drawn, max((chunk.cached for chunk in chunks), default=0), prompt, error)

    def at_once(self, *asked: Asked) -> list[Answer]:
        generations = [self.begin(one) for one in asked]
        self.steps()
        return [self.answer(generation) for generation in generations]

    def one(self, prompt: Ids, task: TaskVersion | None = None, salt: str = "salt") -> Answer:
        (answer,) = self.at_once(Asked(prompt, task, salt))
        return answer


def differences(found: Sequence[Answer], expected: Sequence[Answer]) -> list[int]:
    """The requests whose tokens differ, or whose log-probabilities are not close."""
    return [
        number
        for number, (one, other) in enumerate(zip(found, expected, strict=True))
        if one.ids != other.ids or one.logprobs != pytest.approx(other.logprobs, abs=TOLERANCE)
    ]
