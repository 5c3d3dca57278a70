"""Data-parallel training: several processes, each computing its share of every step's rows.

`torchrun` starts them and sets WORLD_SIZE; without it, one process computes everything.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polyrex.training.data.batches import Example


def _leave() -> None:
    """Leave the process group, of whose resources NCCL would complain at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Ranks:
    """The processes of a run. Making one joins the process group, unless that has been joined.

    They meet where their parameters and gradients lie: cards by NCCL, CPUs by gloo.
    """

    def __init__(self, device: torch.device) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                dist.init_process_group("nccl", device_id=device)
            else:
                dist.init_process_group("gloo")
            atexit.register(_leave)
        together = dist.is_initialized()
        self._rank = dist.get_rank() if together else 0
        self._world = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self._rank == 0

    def own_parts(self, examples: Sequence[Example], parts: int) -> Iterator[Sequence[Example]]:
        """Yield this process's rows of a step, in at most `parts` parts, none of them empty."""
        own = examples[self._rank :: self._world]
        size = -(-len(own) // parts)
        for start in range(0, len(own), max(1, size)):
            yield own[start : start + size]

    def add_up(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Replace each gradient by its sum over all processes; return the sum of their losses.

        Each process's loss is its share of the step's loss, so the sums are what a single process
        would compute.
        """
        if self._world == 1:
            return loss
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.view(1)])
        dist.all_reduce(flat)
        pieces: tuple[Tensor, ...] = flat[:-1].split([g.numel() for g in gradients])  # type: ignore[no-untyped-call]
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return flat[-1]
