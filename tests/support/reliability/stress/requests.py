"""Requests for the embedded engine of which it is known what each is answered alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.base import GenerationRequest, SamplingParams, Token, TokenChunk
from polyrex.server.engines.embedded.generation import Generation, Outcome
from polyrex.server.engines.embedded.runner import ModelRunner
from support.random_inventory import make_task
from support.small_model import VOCABULARY

LONGEST = 80
"""Tokens of a prompt with its completion: five blocks of the cache."""
TOLERANCE = 1e-4

_LENGTHS = (1, 2, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 60)
_ALONE = EmbeddedConfig(
    kv_cache_tokens=1024, slots=16, max_running=1, max_batch_tokens=128, prefix_cache=False
)


@dataclass(frozen=True)
class Answer:
    """What a request was answered: its tokens and how it ended."""

    tokens: tuple[Token, ...]
    prompt: tuple[Token, ...] | None
    end: str  # a finish reason, or the name of an error

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Answer:
        """Of the outcomes of a request that has ended."""
        chunks = [one for one in outcomes if isinstance(one, TokenChunk)]
        last = outcomes[-1]
        return cls(
            tuple(token for chunk in chunks for token in chunk.tokens),
            chunks[0].prompt if chunks else None,
            str(last.finish_reason) if isinstance(last, TokenChunk) else type(last).__name__,
        )

    def agrees(self, other: Answer) -> bool:
        """Whether both have the same tokens, and the same scores but for rounding."""
        return (
            [token.id for token in self.tokens] == [token.id for token in other.tokens]
            and self.end == other.end
            and self._scores() == pytest.approx(other._scores(), abs=TOLERANCE)
        )

    def _scores(self) -> list[float]:
        return [t.logprob or 0.0 for t in (*self.tokens, *(self.prompt or ()))]


@dataclass(frozen=True)
class Known:
    """A request, and what it is answered alone."""

    request: GenerationRequest
    alone: Answer


def known_requests(adapted: AdaptedModel, inventory: Inventory, count: int) -> list[Known]:
    """So many requests, drawn at random, but always the same."""
    chosen = random.Random(0)
    tasks: list[TaskVersion | None] = [None, None]
    tasks += [make_task(inventory, seed) for seed in range(6)]
    tasks.append(_diverging(make_task(inventory, 6)))
    prefixes = [[chosen.randrange(VOCABULARY) for _ in range(60)] for _ in range(2)]
    runner = ModelRunner(adapted, inventory, _ALONE)
    found = []
    for number in range(count):
        request = _request(chosen, f"known-{number}", prefixes, chosen.choice(tasks))
        found.append(Known(request, _alone(runner, request)))
    return found


def _diverging(task: TaskVersion) -> TaskVersion:
    """A task whose outputs are all NaN."""
    nan = torch.full_like(task.router.weights, float("nan"))
    info = replace(task.info, router_sha256="nan")
    return TaskVersion(info, replace(task.router, weights=nan))


def _request(
    chosen: random.Random, name: str, prefixes: Sequence[list[int]], task: TaskVersion | None
) -> GenerationRequest:
    length = chosen.choice(_LENGTHS)
    same = chosen.choice((0, length // 2, length, length))
    prompt = chosen.choice(prefixes)[:same]
    prompt += [chosen.randrange(VOCABULARY) for _ in range(length - len(prompt))]
    scored: dict[str, Any] = {"prompt_logprobs": 1} if chosen.random() < 0.15 else {}
    wanted = chosen.choice((0 if scored else 1, 1, 2, 5, 12, 20))
    sampling = SamplingParams(
        max_tokens=min(wanted, LONGEST - length),
        temperature=chosen.choice((0.0, 0.0, 0.0, 0.7)),
        seed=chosen.randrange(1000),
        logprobs=chosen.choice((None, None, 2)),
        ignore_eos=chosen.random() < 0.5,
        **scored,
    )
    return GenerationRequest(
        name, tuple(prompt), sampling, task, chosen.choice(("one", "one", "two"))
    )


def _alone(runner: ModelRunner, request: GenerationRequest) -> Answer:
    nobody: Any = None  # waits for the answer
    runner.add(Generation(request, nobody))
    with torch.inference_mode():
        while not runner.idle:
            runner.step()
    return Answer.of([outcome for _, outcome in runner.take_deliveries()])
