"""The sides of adapters that are tensor products of leaves, kept as leaves.

The compiled operator, `torch.ops.polyrex.factored_add_` (signature: `modules.TaskState`; source:
cpu/csrc/factored.cpp), computes `h_k = first_k^T X second_k - shift_k sum(X)` for each token and
module, with X = x in rows of q, and adds `sum_k h_k (first_k (x) second_k - shift_k)`, from the
leaves of the B side, to y. It never builds A or B. A task's state is first [p, 16], second [q, 16]
and shift [16] for the A side, then first [p', 16], second [16, q'] and shift [16] for the B side;
the rows of A's second and the columns of B's are padded to multiples of 16. All are in the dtype of
x and y but the shifts, which are float32; in bfloat16 the rows of each second are interleaved in
pairs, [n / 2, ., 2].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import in_twos

RANK = 16
"""The highest rank that the operator takes: one register holds a float for each rank row."""


@dataclass(frozen=True)
class FactoredSides:
    """Both sides of D tasks' adapters, or of D experts, with every scale folded in.

    a_first [D, r, p], a_second [D, r, q], a_shift [D, 1] or None for 0; the same for b.
    """

    a_first: Tensor
    a_second: Tensor
    a_shift: Tensor | None
    b_first: Tensor
    b_second: Tensor
    b_shift: Tensor | None
    operator: ClassVar[str] = "factored_add_"

    @property
    def sizes(self) -> tuple[int, ...]:
        """p, q, p', q'."""
        sides = self.a_first, self.a_second, self.b_first, self.b_second
        return tuple(side.shape[2] for side in sides)

    def packed(self, dtype: torch.dtype) -> Tensor:
        """[D, size]: each task's leaves in the operator's layout."""
        tasks, rank, _ = self.a_first.shape

        def columns(leaves: Tensor) -> Tensor:  # [D, r, n] -> [D, n, 16]
            return F.pad(leaves, (0, 0, 0, RANK - rank)).transpose(1, 2)

        def shifts(shift: Tensor | None) -> Tensor:  # the bytes of [D, 16] float32
            by_row = torch.zeros(tasks, RANK)
            if shift is not None:
                by_row[:, :rank] = shift
            return by_row.view(dtype)

        widened = F.pad(self.b_second, (0, -self.b_second.shape[2] % RANK, 0, RANK - rank))
        second = columns(self.a_second)
        second = F.pad(second, (0, 0, 0, -second.shape[1] % RANK))
        parts = [columns(self.a_first).flatten(1).to(dtype), in_twos(second, dtype)]
        parts += [shifts(self.a_shift), columns(self.b_first).flatten(1).to(dtype)]
        parts += [in_twos(widened, dtype), shifts(self.b_shift)]
        return torch.cat(parts, 1).contiguous()
