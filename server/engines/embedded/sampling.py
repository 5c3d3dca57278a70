"""From logits to tokens, and to log-probabilities under the unmodified distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyrex.server.engines.base import SamplingParams, Token
from polyrex.server.errors import EngineError

_NUCLEUS_FIRST_TRY = 256  # tokens; only if they are too few is the whole vocabulary sorted
_SCORED_AT_ONCE = 64  # positions, each of which takes a vocabulary of float32


class Draw(NamedTuple):
    """How one request draws from its row of logits. Each request has its own generator."""

    sampling: SamplingParams
    generator: torch.Generator


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[Token | Exception]:
    """Draw a token from each row of logits [n, vocabulary]; a row that fails yields its error."""
    logits = logits.float()
    best, ids = logits.max(-1)
    rows = zip(logits, best.tolist(), ids.tolist(), draws, strict=True)
    return [_choose(row, value, token, draw) for row, value, token, draw in rows]


def score(logits: Tensor, tokens: Sequence[int], alternatives: int) -> list[Token]:
    """Score each token by its row of logits [n, vocabulary], with that many alternatives."""
    scored = []
    for start in range(0, len(tokens), _SCORED_AT_ONCE):
        rows = slice(start, start + _SCORED_AT_ONCE)
        logprobs = logits[rows].float().log_softmax(-1)
        ids = torch.tensor(tokens[rows], device=logits.device)
        own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        values, best = (side.tolist() for side in logprobs.topk(alternatives))
        tops = (tuple(zip(*pair, strict=True)) for pair in zip(best, values, strict=True))
        scored += [Token(*fields) for fields in zip(tokens[rows], own, tops, strict=True)]
    return scored


def _choose(row: Tensor, best: float, greedy: int, draw: Draw) -> Token | Exception:
    sampling = draw.sampling
    try:
        if not math.isfinite(best):
            return EngineError("the model's output for this request is not finite")
        token = greedy if sampling.temperature == 0 else _sample(row, draw)
        if sampling.logprobs is None:
            return Token(token)
        return score(row[None], [token], sampling.logprobs)[0]
    except Exception as error:
        return error


def _sample(row: Tensor, draw: Draw) -> int:
    """Invert the distribution function at one uniform number from the request's generator."""
    sampling = draw.sampling
    # Subtract the maximum first: a tiny temperature then gives -inf, never inf - inf.
    probabilities = ((row - row.max()) / sampling.temperature).softmax(-1)
    ids = None
    if sampling.top_p < 1:
        probabilities, ids = _nucleus(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    uniform = torch.rand((), generator=draw.generator, dtype=torch.float64).item()
    place = torch.searchsorted(cumulative, cumulative[-1] * uniform, right=True)
    place = place.clamp(max=len(cumulative) - 1)
    return int(place if ids is None else ids[place])


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens whose mass reaches `top_p`, at least one; best first."""
    for count in (min(_NUCLEUS_FIRST_TRY, len(probabilities)), len(probabilities)):
        values, ids = probabilities.topk(count)
        before = values.cumsum(-1) - values
        if before[-1] >= top_p:
            break
    kept = before < top_p
    kept[0] = True
    return values[kept], ids[kept]
