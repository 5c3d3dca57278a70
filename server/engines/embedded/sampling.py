"""From logits to tokens, and to log-probabilities under the unmodified distribution.

All rows of a batch are drawn together, and the host waits for the device once: for the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from polyrex.server.engines.base import SamplingParams, Token
from polyrex.server.errors import EngineError

_NUCLEUS_FIRST_TRY = 256  # tokens; only where they are too few is the whole vocabulary sorted
_SCORED_AT_ONCE = 64  # positions, each of which takes a vocabulary of float32
_DRAWN_AT_ONCE = 1 << 25  # logits, each of which takes 16 bytes
_DRAWN_AT_ONCE_ON_CPU = 1 << 16  # logits: what a core's cache holds
_COLDEST = torch.finfo(torch.float32).tiny
"""Lower temperatures are greedy: in float32 they may be 0, which nothing can be divided by."""


class Draw(NamedTuple):
    """How one request draws from its row of logits. Each request has its own generator."""

    sampling: SamplingParams
    generator: torch.Generator


class _Sampled(NamedTuple):
    """A row of logits from which a token is drawn by inverting the distribution function."""

    row: int
    temperature: float
    top_p: float
    uniform: float  # from the request's generator


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[Token | Exception]:
    """Draw a token from each row of logits [n, vocabulary]; one that is not finite is an error."""
    logits = logits.float()
    best, tokens = logits.max(-1)
    sampled = [
        _Sampled(row, sampling.temperature, sampling.top_p, _uniform(generator))
        for row, (sampling, generator) in enumerate(draws)
        if sampling.temperature >= _COLDEST
    ]
    short = _sample(logits, best, tokens, sampled, _NUCLEUS_FIRST_TRY)
    found = torch.stack((best.double(), tokens.double(), short)).tolist()
    if any(found[2]):
        rest = [one for one in sampled if found[2][one.row]]
        _sample(logits, best, tokens, rest, logits.shape[1])
        found[1] = tokens.tolist()
    chosen: list[Token | Exception] = [
        Token(int(token))
        if math.isfinite(value)
        else EngineError("the model's output for this request is not finite")
        for value, token, _ in zip(*found, strict=True)
    ]
    _add_scores(chosen, logits, draws)
    return chosen


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[Token]:
    """Score each token by its row of logits [n, vocabulary], with that many alternatives."""
    scored = []
    for start in range(0, len(tokens), _SCORED_AT_ONCE):
        rows = slice(start, start + _SCORED_AT_ONCE)
        logprobs = logits[rows].float().log_softmax(-1)
        own = logprobs.gather(1, _moved(torch.tensor(tokens[rows]), logits.device)[:, None])
        found = torch.cat([part.double() for part in (own, *logprobs.topk(alternatives))], 1)
        for token, (logprob, *tops) in zip(tokens[rows], found.tolist(), strict=True):
            values, ids = tops[:alternatives], map(int, tops[alternatives:])
            scored.append(Token(token, logprob, tuple(zip(ids, values, strict=True))))
    return scored


def _add_scores(chosen: list[Token | Exception], logits: Tensor, draws: Sequence[Draw]) -> None:
    """Score the tokens of the requests that ask for it."""
    asked = {
        row: (token.id, draw.sampling.logprobs)
        for row, (token, draw) in enumerate(zip(chosen, draws, strict=True))
        if isinstance(token, Token) and draw.sampling.logprobs is not None
    }
    if asked:
        tokens, counts = zip(*asked.values(), strict=True)
        own = logits.index_select(0, _moved(torch.tensor(list(asked)), logits.device))
        scored = score(own, tokens, max(counts))
        for row, token, count in zip(asked, scored, counts, strict=True):
            chosen[row] = replace(token, top=token.top[:count])


def _sample(
    logits: Tensor, best: Tensor, tokens: Tensor, sampled: Sequence[_Sampled], first: int
) -> Tensor:
    """Draw the tokens of some rows, in place, from the `first` most likely ones under a top_p.

    Returns [n] float64: 1 where the mass of these was less than top_p.
    """
    short = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    most = _DRAWN_AT_ONCE_ON_CPU if logits.device.type == "cpu" else _DRAWN_AT_ONCE
    for part in _parts(sampled, max(1, most // logits.shape[1])):
        numbers = _moved(torch.tensor(part, dtype=torch.float64), logits.device)
        rows, uniform = numbers[:, 0].long(), numbers[:, 3:]
        temperature, top_p = numbers[:, 1:2].float(), numbers[:, 2:3].float()
        # Subtract the maximum first: a tiny temperature then gives -inf, never inf - inf.
        shifted = logits.index_select(0, rows) - best.index_select(0, rows)[:, None]
        probabilities = (shifted / temperature).softmax(-1)
        if part[0].top_p < 1:
            drawn, few = _from_nucleus(probabilities, top_p, uniform, first)
            short.index_copy_(0, rows, few.double())
        else:
            drawn = _invert(probabilities, uniform)
        tokens.index_copy_(0, rows, drawn[:, 0])
    return short


def _parts(sampled: Sequence[_Sampled], size: int) -> Iterator[list[_Sampled]]:
    """At most `size` rows at a time, all of them with a top_p, or none."""
    for nucleus in (True, False):
        rows = [one for one in sampled if (one.top_p < 1) is nucleus]
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def _from_nucleus(
    probabilities: Tensor, top_p: Tensor, uniform: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Tokens [m, 1] from the fewest most likely ones whose mass reaches `top_p`, at least one.

    Looks at the `first` most likely ones. Also returns where they were too few, [m].
    """
    first = min(first, probabilities.shape[1])
    values, ids = probabilities.topk(first)
    before = values.cumsum(-1) - values
    kept = before < top_p
    kept[:, 0] = True
    few = (before[:, -1:] < top_p)[:, 0]
    if first == probabilities.shape[1]:
        few = torch.zeros_like(few)
    return ids.gather(1, _invert(values * kept, uniform)), few


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of weights [m, n] passes `uniform` [m, 1] of its end: [m, 1]."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    end = cumulative[:, -1:].contiguous()
    places = torch.searchsorted(cumulative, end * uniform, right=True)
    # Where rounding puts it at the very end: the last place with a weight.
    last = torch.searchsorted(cumulative, end)
    return places.minimum(last).clamp_(max=weights.shape[1] - 1)  # of NaN, nothing is the last


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _moved(numbers: Tensor, device: torch.device) -> Tensor:
    """The numbers on the device; the host does not wait for it."""
    return numbers.to(device, non_blocking=True)
