"""AdamW with a learning rate for each group of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from polyrex.adapters.methods.protocol import LearningRates
from polyrex.training.model.multi_task import Groups


def schedule(step: int, steps: int, warmup: int) -> float:
    """The factor on the learning rates at `step`, from 0: a linear warm-up, then linear decay."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def clip(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Scale gradients so that the norm of all together is at most `most`.

    `nn.utils.clip_grad_norm_` is the slow twin. On CUDA it does the same; on other devices, where
    tests count a step's kernels, it takes two for every parameter.
    """
    gradients = [each.grad for each in parameters if each.grad is not None]
    if gradients:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))


class Optimiser:
    """AdamW without weight decay, whose whole state is a dict of named tensors for a checkpoint."""

    def __init__(self, groups: Groups, rates: LearningRates, *, clip: float = 1.0) -> None:
        self._named = {name: p for members in groups.values() for name, p in members}
        self._rates = rates
        self._clip = clip
        # On a card, one kernel for many parameters; the CPU goes on as checkpoints of old expect.
        self._fused = any(parameter.device.type == "cuda" for parameter in self.parameters)
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for _, p in members], "lr": rates.of(name), "name": name}
                for name, members in groups.items()
                if members
            ],
            weight_decay=0.0,
            betas=(0.9, 0.98),
            fused=self._fused,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, in the same order on every rank."""
        return list(self._named.values())

    def step(self, multiplier: float) -> None:
        """Clip each group's gradient by its norm, step at the rates times `multiplier`, and clear
        the gradients."""
        for group in self._adamw.param_groups:
            # By group: one norm over all would let the many leaves silence the few gates.
            clip(group["params"], self._clip)
            group["lr"] = self._rates.of(group["name"]) * multiplier
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The parameters, their step counts and both moments, by name, on the CPU."""
        tensors = {f"value/{name}": p.detach().cpu() for name, p in self._named.items()}
        for name, parameter in self._named.items():
            for key, value in self._adamw.state[parameter].items():
                tensors[f"{key}/{name}"] = value.cpu()
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned, wherever it was trained; raises KeyError if it is of other
        parameters."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(tensors[f"value/{name}"])
                moments = {
                    key: tensors[f"{key}/{name}"].to(parameter.device, copy=True)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                count = tensors[f"step/{name}"].clone()  # lies on the CPU, unless fused
                step = count.to(parameter.device) if self._fused else count
                self._adamw.state[parameter] = {"step": step, **moments}
