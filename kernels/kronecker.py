"""The matrices of adapters that are sums of Kronecker products, kept as factors.

The compiled operator, `torch.ops.polyrex.kronecker_add_` (signature: `modules.TaskState`; source:
cpu/csrc/kronecker.cpp), computes `Y = sum_e first_e^T X second_e` for each token and module, with
X = x in rows of q, and adds Y, row by row, to y. A task's state is first [p' * E, p] (e is fastest
in its rows), then second [E * q, q']; p' * E and q' are padded to multiples of 16, p to a multiple
of 32, the rows of second to a multiple of 2 in each term and of 32 in all. Both are in the dtype of
x and y; in bfloat16 the rows of second are interleaved in pairs, [E * q / 2, q', 2].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import LANES, in_twos


class Kronecker(NamedTuple):
    """`delta = x W_t` of D tasks with `W_t = sum_e first_e (x) second_e`, cut to [d_in, d_out]."""

    first: Tensor  # [D, E, p, p']
    second: Tensor  # [D, E, q, q']

    @property
    def operator(self) -> str:
        """The compiled operator that adds delta to y."""
        return "kronecker_add_"

    @property
    def sizes(self) -> tuple[int, ...]:
        """E, p, p', q, q'."""
        return *self.first.shape[1:], *self.second.shape[2:]

    def delta(self, x: Tensor) -> Tensor:
        """[D, n, d_in] -> [D, n, p' * q'] for D runs of n tokens; with D = 1, for any runs.

        In the dtype of the factors, which is that of x. The caller cuts off the outputs beyond
        d_out. With X = x in rows of q: `Y = sum_e first_e^T (X second_e)`.
        """
        (tasks, terms, p, rows), (q, columns) = self.first.shape, self.second.shape[2:]
        grid = F.pad(x, (0, p * q - x.shape[-1])).view(tasks, -1, q)  # [D, n * p, q]
        inner = torch.bmm(grid, self.second.transpose(1, 2).flatten(2))  # [D, n * p, E * q']
        inner = inner.view(tasks, -1, p, terms, columns).permute(0, 1, 4, 3, 2)
        outer = torch.bmm(inner.reshape(tasks, -1, terms * p), self.first.flatten(1, 2))
        by_row = outer.view(tasks, -1, columns, rows).transpose(2, 3)
        return by_row.reshape(*x.shape[:-1], rows * columns)

    def packed(self, dtype: torch.dtype) -> Tensor:
        """[D, size]: each task's factors in the operator's layout."""
        first = self.first.permute(0, 3, 1, 2).flatten(1, 2)  # [D, p' * E, p]
        first = F.pad(first, (0, -first.shape[2] % 32, 0, -first.shape[1] % LANES))
        second = F.pad(self.second, (0, 0, 0, self.second.shape[2] % 2)).flatten(1, 2)
        second = F.pad(second, (0, -second.shape[2] % LANES, 0, -second.shape[1] % 32))
        return torch.cat([first.flatten(1).to(dtype), in_twos(second, dtype)], 1)
