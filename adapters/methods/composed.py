"""Adapters of single tasks, multiplied out: what training, scoring and export read.

`Experts.compose` makes them. Tokens of one task come in runs (a padded batch's rows), so that its
adapter is built once for all of them. Engines, whose tokens come in any mix, run adapters in other
forms (adapters/serving/).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.kernels.kronecker import Kronecker


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


Composed = LowRank | Kronecker
