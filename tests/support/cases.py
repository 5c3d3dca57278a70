"""Inputs that the tests and benchmarks of kernels share: sizes, and the popularity of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Popularity = Literal["distinct", "uniform", "skewed", "identical"]
"""The tasks of tokens: each its own; drawn evenly; for half of them the first, for a quarter the
second, and so on; or one for all."""


@dataclass(frozen=True)
class RankSpaceCase:
    """Sizes of one call of `rank_space`; the names are those of its docstring."""

    tokens: int
    d_in: int
    d_out: int
    experts: int
    rank: int
    splits: int = 1
    popularity: Popularity = "uniform"

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-{self.d_in}x{self.d_out}-E{self.experts}-r{self.rank}"
        return f"{sizes}-S{self.splits}-{self.popularity}"


# Odd sizes first: whole tiles hide mistakes at their edges.
RANK_SPACE_CASES = (
    *(
        RankSpaceCase(tokens, 65, 129, 5, 3, popularity=popularity)
        for popularity in ("distinct", "uniform", "skewed", "identical")
        for tokens in (1, 7, 33)
    ),
    RankSpaceCase(0, 65, 129, 5, 3),
    RankSpaceCase(0, 63, 21, 4, 5, splits=3),
    RankSpaceCase(13, 63, 21, 4, 5, splits=3),
    RankSpaceCase(7, 30, 50, 3, 2, splits=5, popularity="distinct"),
    RankSpaceCase(11, 17, 19, 1, 1),
    RankSpaceCase(32, 576, 1536, 8, 16, popularity="distinct"),
)


def task_of_token(popularity: Popularity, tokens: int, generator: torch.Generator) -> Tensor:
    """The number of each token's task, [T] int64, below max(T, 1)."""
    if popularity == "distinct":
        return torch.arange(tokens)
    if popularity == "identical":
        return torch.zeros(tokens, dtype=torch.int64)
    if popularity == "uniform":
        return torch.randint(max(tokens, 1), (tokens,), generator=generator)
    halvings = torch.empty(tokens).geometric_(0.5, generator=generator).long() - 1
    return halvings.clamp_max(max(tokens, 1) - 1)


def rank_space_inputs(
    case: RankSpaceCase, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of `rank_space`: x, a, b, weights; the weights of each split sum to 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = case.experts * case.rank
    x = normal(case.tokens, case.d_in)
    a = normal(case.splits, width, case.d_in // case.splits) / case.d_in**0.5
    b = normal(case.splits, width, case.d_out // case.splits) / case.rank
    tasks = normal(max(case.tokens, 1), case.splits, case.experts).softmax(-1)
    weights = tasks[task_of_token(case.popularity, case.tokens, generator)]
    return x.to(dtype), a.to(dtype), b.to(dtype), weights.to(dtype)


def relative_rms(found: Tensor, reference: Tensor) -> float:
    """RMS of the error over RMS of the reference; 0 if both are equal, NaN if one holds NaN."""
    error = (found.double() - reference.double()).square().sum().sqrt()
    size = reference.double().square().sum().sqrt()
    return 0.0 if error == 0 else (error / size).item()
