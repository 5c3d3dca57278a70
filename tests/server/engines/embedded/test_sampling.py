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


MIXED = (
    SamplingParams(1, temperature=0.0),
    SamplingParams(1),
    SamplingParams(1, temperature=0.7, top_p=0.9),
    SamplingParams(1, temperature=1.3, top_p=0.999),
    SamplingParams(1, temperature=1e-30),
    SamplingParams(1, temperature=0.5, top_p=0.01, logprobs=0),
    SamplingParams(1, logprobs=3),
)


def draws(count: int, seed: int = 0) -> list[Draw]:
    """Draws of all kinds, each with a generator of its own."""
    return [
        Draw(MIXED[row % len(MIXED)], torch.Generator().manual_seed(seed + row))
        for row in range(count)
    ]


def drawn_alone(row: torch.Tensor, draw: Draw) -> int:
    """The slow twin: one row, sorted as a whole."""
    sampling = draw.sampling
    if sampling.temperature == 0:
        return int(row.argmax())
    probabilities = ((row - row.max()) / sampling.temperature).softmax(-1)
    ids = torch.arange(len(row))
    if sampling.top_p < 1:
        probabilities, ids = probabilities.sort(descending=True)
        kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
        kept[0] = True
        probabilities, ids = probabilities[kept], ids[kept]
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand((), generator=draw.generator, dtype=torch.float64)
    return int(ids[torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True)])


@pytest.mark.parametrize("vocabulary", [3, 1000, 30000])
@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_many_rows_at_once_are_drawn_as_one_by_one(vocabulary: int, spread: float) -> None:
    logits = torch.randn(21, vocabulary, generator=torch.Generator().manual_seed(1)) * spread
    found = [token.id for token in choose(logits, draws(21)) if isinstance(token, Token)]
    alone = [drawn_alone(row, draw) for row, draw in zip(logits, draws(21), strict=True)]
    assert found == alone
    # A wrong case: each row is drawn with the number of another request.
    others = [drawn_alone(row, draw) for row, draw in zip(logits, draws(21, seed=1), strict=True)]
    assert found != others


def test_each_row_gets_the_alternatives_that_it_asks_for() -> None:
    logits = torch.randn(21, 50, generator=torch.Generator().manual_seed(1))
    for token, draw, row in zip(choose(logits, draws(21)), draws(21), logits, strict=True):
        assert isinstance(token, Token)
        assert len(token.top) == (draw.sampling.logprobs or 0)
        if draw.sampling.logprobs is not None:
            assert token.logprob == pytest.approx(row.log_softmax(-1)[token.id].item())
            best = row.log_softmax(-1).topk(draw.sampling.logprobs)
            assert [one for one, _ in token.top] == best.indices.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_rows_change_no_other(value: float) -> None:
    logits = torch.randn(21, 50, generator=torch.Generator().manual_seed(1))
    whole = choose(logits, draws(21))
    logits[3:9] = value
    broken = choose(logits, draws(21))
    assert all(isinstance(token, Exception) for token in broken[3:9])
    assert broken[:3] + broken[9:] == whole[:3] + whole[9:]


def test_one_broken_row_is_one_error() -> None:
    logits = torch.stack([LOGITS, LOGITS * float("nan"), LOGITS])
    draws = [Draw(SamplingParams(max_tokens=1, temperature=0.0), torch.Generator())] * 3
    first, broken, last = choose(logits, draws)
    assert first == last == Token(0)
    assert isinstance(broken, Exception)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-40, 1e-30])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_near_zero_is_greedy(temperature: float, top_p: float) -> None:
    logits = torch.tensor([-3.0, 2.0, 1.0, 1.9999])
    assert draw(200, logits, temperature=temperature, top_p=top_p) == {1: 200}
