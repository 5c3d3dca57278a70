"""Log-probabilities are those of a plain forward pass of the unmodified model."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from polyrex.server.engines.base import SamplingParams, Token
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from support.engine_calls import (
    GREEDY,
    Answer,
    MakeEngine,
    MakeTask,
    PlainModel,
    complete,
    prompt,
    started,
)


def check(tokens: tuple[Token, ...], logprobs: torch.Tensor, alternatives: int) -> None:
    """Compare tokens with rows of log-probabilities [tokens, vocabulary]."""
    for token, row in zip(tokens, logprobs, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-3)
        values, ids = row.topk(alternatives)
        assert [entry[0] for entry in token.top] == ids.tolist()
        assert [entry[1] for entry in token.top] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.mark.parametrize("adapted_request", [False, True])
def test_completion_and_prompt_equal_a_plain_forward(
    engine: EmbeddedEngine, plain: PlainModel, make_task: MakeTask, adapted_request: bool
) -> None:
    task = make_task(1) if adapted_request else None
    sampling = replace(GREEDY, max_tokens=4, logprobs=3, prompt_logprobs=2)
    answer = asyncio.run(complete(engine, prompt(1), task, sampling))
    logprobs = plain.logprobs(prompt(1) + answer.ids, task)
    check(answer.tokens, logprobs[13:-1], 3)
    assert answer.prompt is not None
    assert answer.prompt[0] == Token(prompt(1)[0])
    assert tuple(token.id for token in answer.prompt) == prompt(1)
    check(answer.prompt[1:], logprobs[:13], 2)


def test_temperature_does_not_change_them(engine: EmbeddedEngine, plain: PlainModel) -> None:
    sampling = SamplingParams(3, temperature=1.7, top_p=0.8, seed=5, logprobs=0, ignore_eos=True)
    answer = asyncio.run(complete(engine, prompt(1), None, sampling))
    assert len(answer.tokens) == 3
    check(answer.tokens, plain.logprobs(prompt(1) + answer.ids)[13:-1], 0)


def test_a_prompt_can_be_scored_without_a_completion(
    engine: EmbeddedEngine, plain: PlainModel
) -> None:
    sampling = replace(GREEDY, max_tokens=0, prompt_logprobs=0)
    answer = asyncio.run(complete(engine, prompt(2), None, sampling))
    assert (answer.tokens, answer.finish_reason) == ((), "length")
    assert answer.prompt is not None
    check(answer.prompt[1:], plain.logprobs(prompt(2))[:-1], 0)


def test_a_prompt_in_several_batches_is_scored_once(
    make_engine: MakeEngine, plain: PlainModel
) -> None:
    sampling = replace(GREEDY, max_tokens=2, logprobs=1, prompt_logprobs=1)

    async def run() -> Answer:
        async with started(make_engine(max_batch_tokens=16, max_running=8)) as engine:
            others = [complete(engine, prompt(9, length=20)) for _ in range(2)]
            answer, *_ = await asyncio.gather(
                complete(engine, prompt(3, length=70), None, sampling), *others
            )
            return answer

    answer = asyncio.run(run())
    logprobs = plain.logprobs(prompt(3, length=70) + answer.ids)
    assert answer.prompt is not None
    check(answer.prompt[1:], logprobs[:69], 1)
    check(answer.tokens, logprobs[69:-1], 1)
