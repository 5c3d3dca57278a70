"""How token routers settle in training: the weights that they give the experts on fixed rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from polyrex.adapters.files.tensor_file import write_atomic
from polyrex.training.data.batches import Batch
from polyrex.training.loop.run import StepRecord
from polyrex.training.model.multi_task import MultiTaskModel


class RouterWatch:
    """Records `softmax(R x)`, the weights of every module's token router, at the answers' tokens.

    It is the `progress` of a training run, and keeps what it recorded in `path` for resumed runs.
    """

    def __init__(self, model: MultiTaskModel, probe: Batch, path: Path, *, every: int = 20) -> None:
        """Record the weights of `model` before training; calls record them every so many steps."""
        self.every = every
        self.model = model
        self.probe = probe
        self.path = path
        self.seen: dict[int, Tensor] = {}
        if path.exists():
            self.seen = {int(step): weights for step, weights in load_file(path).items()}
        self.seen[0] = self.look()

    def __call__(self, record: StepRecord) -> None:
        """Record the weights after a step, if it is time."""
        done = record.step + 1
        if done % self.every == 0:
            self.seen[done] = self.look()
            write_atomic(self.path, save({str(step): each for step, each in self.seen.items()}))

    @torch.no_grad()
    def look(self) -> Tensor:
        """The weights [M, n, E] at the n positions of the probe that predict an answer's token."""
        found: dict[int, Tensor] = {}

        def note(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            router = layer.experts.get_parameter("token_router")
            chosen = inputs[0].flatten(0, 1)[self.probe.positions]
            found[layer.index] = torch.softmax(F.linear(chosen.float(), router), -1)

        layers = self.model.adapted.layers
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        self.model.loss(self.probe)
        for hook in hooks:
            hook.remove()
        return torch.stack([found[layer.index] for layer in layers]).cpu()

    def curve(self) -> dict[str, list[float]]:
        """The distance of each step's weights from the final ones (total variation, 0 to 1), and
        their entropy, which is 1 for equal weights."""
        steps = sorted(self.seen)
        end = self.seen[steps[-1]]
        distances = [(self.seen[step] - end).abs().sum(-1).mean().item() / 2 for step in steps]
        entropies = [
            torch.special.entr(self.seen[step]).sum(-1).mean().item() / math.log(end.shape[-1])
            for step in steps
        ]
        return {
            "steps": [float(step) for step in steps],
            "distance": [round(each, 4) for each in distances],
            "entropy": [round(each, 4) for each in entropies],
        }
