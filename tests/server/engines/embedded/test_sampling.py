"""Tokens are drawn by seed, temperature and top_p, for each request on its own."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch

from polyrex.server.engines.base import SamplingParams, Token
from polyrex.server.engines.embedded.engine import EmbeddedEngine
from polyrex.server.engines.embedded.sampling import Draw, choose
from support.engine_calls import complete, prompt

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def draw(count: int, logits: torch.Tensor = LOGITS, **sampling: float) -> Counter[int]:
    """How often each token occurs in `count` draws."""
    params = SamplingParams(max_tokens=1, **sampling)  # type: ignore[arg-type]  # floats, all of them
    generator = torch.Generator().manual_seed(0)
    chosen = choose(logits.expand(count, -1), [Draw(params, generator)] * count)
    return Counter(token.id for token in chosen if isinstance(token, Token))


def test_a_seed_repeats_a_completion_in_any_company(engine: EmbeddedEngine) -> None:
    seeded = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    noise = SamplingParams(max_tokens=8, ignore_eos=True)

    async def run() -> list[tuple[int, ...]]:
        first = await complete(engine, prompt(1), None, seeded)
        others = [complete(engine, prompt(i), None, noise) for i in range(4)]
        second, *_ = await asyncio.gather(complete(engine, prompt(1), None, seeded), *others)
        other_seed = SamplingParams(max_tokens=8, seed=4, ignore_eos=True)
        third = await complete(engine, prompt(1), None, other_seed)
        return [first.ids, second.ids, third.ids]

    first, second, third = asyncio.run(run())
    assert first == second
    assert first != third


def test_completions_without_a_seed_differ(engine: EmbeddedEngine) -> None:
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)

    async def run() -> set[tuple[int, ...]]:
        requests = [complete(engine, prompt(1), None, sampling) for _ in range(3)]
        return {answer.ids for answer in await asyncio.gather(*requests)}

    assert len(asyncio.run(run())) == 3


def test_tokens_come_as_often_as_they_are_likely() -> None:
    counts = draw(4000)
    for token, expected in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert counts[token] / 4000 == pytest.approx(expected, abs=0.03)


def test_temperature_sharpens_the_distribution() -> None:
    counts = draw(4000, temperature=0.5)
    squares = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert counts[0] / 4000 == pytest.approx((squares[0] / squares.sum()).item(), abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1e-30])
def test_no_temperature_is_the_most_likely_token(temperature: float) -> None:
    assert set(draw(100, temperature=temperature)) == {0}


@pytest.mark.parametrize(
    ("top_p", "tokens"), [(0.3, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest_tokens_with_its_mass(top_p: float, tokens: set[int]) -> None:
    assert set(draw(1000, top_p=top_p)) == tokens


def test_top_p_holds_over_a_flat_vocabulary() -> None:
    counts = draw(2000, torch.zeros(4096), top_p=0.5)
    assert 1000 < len(counts) <= 2048


def test_one_broken_row_is_one_error() -> None:
    logits = torch.stack([LOGITS, LOGITS * float("nan"), LOGITS])
    draws = [Draw(SamplingParams(max_tokens=1, temperature=0.0), torch.Generator())] * 3
    first, broken, last = choose(logits, draws)
    assert first == last == Token(0)
    assert isinstance(broken, Exception)
