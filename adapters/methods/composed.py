"""Adapters of single tasks, multiplied out: what training, scoring and export read.

`Experts.compose` makes them. Tokens of one task come in runs (a padded batch's rows), so that its
adapter is built once for all of them; engines, whose tokens come in any mix, have their own ways
(adapters/serving.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRank(NamedTuple):
    """`delta = B_t A_t x` of D tasks, with every scale in b: a LoRA each."""

    a: Tensor  # [D, r, d_in]
    b: Tensor  # [D, r, d_out], the B sides transposed

    def delta(self, x: Tensor) -> Tensor:
        """For D runs of n tokens, [D, n, d_in], or any number of runs where D = 1: [., n, d_out].

        In the dtype of the sides, which is x's.
        """
        if len(self.a) == 1:
            return F.linear(x, self.a[0]) @ self.b[0]
        return torch.bmm(torch.bmm(x, self.a.transpose(1, 2)), self.b)


class Kronecker(NamedTuple):
    """`delta = x W_t` with `W_t = sum_e first_e (x) second_e`, cut to `[d_in, d_out]`."""

    first: Tensor  # [D, E, p, p']
    second: Tensor  # [D, E, q, q']

    def delta(self, x: Tensor) -> Tensor:
        """As `LowRank.delta`, of p' * q' outputs; those beyond d_out are for the caller to cut.

        With X = x in rows of q: `Y = sum_e first_e^T (X second_e)`.
        """
        (tasks, terms, p, rows), (q, columns) = self.first.shape, self.second.shape[2:]
        grid = F.pad(x, (0, p * q - x.shape[-1])).view(tasks, -1, q)  # [D, n * p, q]
        inner = torch.bmm(grid, self.second.transpose(1, 2).flatten(2))  # [D, n * p, E * q']
        inner = inner.view(tasks, -1, p, terms, columns).permute(0, 1, 4, 3, 2)
        outer = torch.bmm(inner.reshape(tasks, -1, terms * p), self.first.flatten(1, 2))
        by_row = outer.view(tasks, -1, columns, rows).transpose(2, 3)
        return by_row.reshape(*x.shape[:-1], rows * columns)


Composed = LowRank | Kronecker
