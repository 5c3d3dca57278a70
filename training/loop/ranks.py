"""Several processes that train together, each on its part of every step's rows (data parallel).

Started by `torchrun`, which sets WORLD_SIZE; without it there is one process, and nothing to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrex.training.data.batches import Example


class Ranks:
    """The processes of a run; joins them when it is made, where they have not met yet."""

    def __init__(self) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        together = dist.is_initialized()
        self._rank = dist.get_rank() if together else 0
        self._world = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self._rank == 0

    def own_parts(self, examples: Sequence[Example], parts: int) -> Iterator[Sequence[Example]]:
        """This process's rows of a step, in at most `parts` parts; none is empty."""
        own = examples[self._rank :: self._world]
        size = -(-len(own) // parts)
        for start in range(0, len(own), max(1, size)):
            yield own[start : start + size]

    def add_up(self, loss: float, parameters: Sequence[nn.Parameter]) -> float:
        """Sum the gradients of all processes into everyone's, and the losses, which are returned.

        The parts' losses are shares of the step's, so that sums are what one process would have.
        """
        if self._world == 1:
            return loss
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([loss])])
        dist.all_reduce(flat)
        pieces: tuple[Tensor, ...] = flat[:-1].split([g.numel() for g in gradients])  # type: ignore[no-untyped-call]
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return float(flat[-1])
