"""What adapters are compared with: LoRAs of many tasks in plain PyTorch, and one LoRA for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyrex.adapters.serving.layers import Slice
from polyrex.kernels.routing import StepRouting


class LoraWeights:
    """Random LoRAs of one layer's modules for D tasks: a [D, r, d_in] and b [D, d_out, r] each."""

    def __init__(
        self,
        tasks: int,
        rank: int,
        d_in: int,
        outputs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02)

        self.a = [normal(tasks, rank, d_in) for _ in outputs]
        self.b = [normal(tasks, d_out, rank) for d_out in outputs]

    @staticmethod
    def bytes_of(tasks: int, rank: int, d_in: int, outputs: Sequence[int]) -> int:
        """The size of the weights in a 16-bit dtype."""
        return 2 * tasks * rank * (len(outputs) * d_in + sum(outputs))

    def add_gathered_(self, y: Tensor, x: Tensor, rows: Tensor) -> None:
        """Add each token's own LoRA, of task rows [T], to y: gathers, then products in batches.

        The modules' outputs lie side by side in y [T, d].
        """
        begin = 0
        for a, b in zip(self.a, self.b, strict=True):
            h = torch.bmm(a.index_select(0, rows), x.unsqueeze(2))  # [T, r, 1]
            end = begin + b.shape[1]
            y[:, begin:end] += torch.bmm(b.index_select(0, rows), h).squeeze(2)
            begin = end

    def add_first_(self, y: Tensor, x: Tensor) -> None:
        """Add the first task's LoRA for all tokens: two plain products a module."""
        begin = 0
        for a, b in zip(self.a, self.b, strict=True):
            end = begin + b.shape[1]
            y[:, begin:end].addmm_(x @ a[0].T, b[0].T)
            begin = end


class GatheredLoraLayer:
    """A served layer that has a LoRA for each slot of a routing table in place of experts.

    That is one for each task, and a few more: slot 0, the base model's, has one as any other.
    """

    state_bytes = 0

    def __init__(
        self, slices: Sequence[Slice], slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        target, rank = slices[0].experts.target, slices[0].experts.spec.rank
        outputs = [part.columns.stop - part.columns.start for part in slices]
        self._loras = LoraWeights(slots, rank, target.d_in, outputs, dtype, device)

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add each token's LoRA for x [T, d_in] to y [T, d], in place."""
        self._loras.add_gathered_(y, x, step.rows)
