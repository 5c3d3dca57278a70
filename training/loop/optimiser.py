"""AdamW over the kinds of parameter, each with its own learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Groups = dict[str, list[tuple[str, nn.Parameter]]]


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates. Experts, scalar gates, routing logits and the routers of tokens want
    different ones: a step of AdamW moves every number by about its learning rate, and they live on
    different scales."""

    experts: float = 2e-3
    gates: float = 3e-4
    routing: float = 5e-2
    token_routers: float = 2e-3

    def of(self, group: str) -> float:
        """The rate of a parameter group, by its name."""
        rate: float = getattr(self, group)
        return rate


_RATES = {
    "lora": LearningRates(experts=2e-2),
    "poly": LearningRates(experts=2e-2, routing=0.8),
    "mhr": LearningRates(experts=2e-2, routing=0.8),
    "molora": LearningRates(experts=1e-2, token_routers=1e-2),
    "sira": LearningRates(experts=1e-2, token_routers=1e-2),
    "trex": LearningRates(experts=3e-3, token_routers=3e-3),
}
_LEAVES = LearningRates(experts=0.3, gates=0.03, routing=0.8)


def rates_of(method: str) -> LearningRates:
    """The rates that a method starts from: those that the comparison study's search found best
    (`tests/results/study/search`), on the upper third of a small model.

    LoRA, Poly and MHR divide by the rank. Leaves are drawn from N(0, 1) and have far to go.
    """
    return _RATES.get(method, _LEAVES)


def schedule(step: int, steps: int, warmup: int) -> float:
    """What learning rates are multiplied by at `step` (from 0): linear up, then linear to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


class Optimiser:
    """AdamW (no weight decay) whose whole state is named tensors, so that a file can hold it."""

    def __init__(self, groups: Groups, rates: LearningRates, *, clip: float = 1.0) -> None:
        self._named = {name: p for members in groups.values() for name, p in members}
        self._rates = rates
        self._clip = clip
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for _, p in members], "lr": rates.of(name), "name": name}
                for name, members in groups.items()
                if members
            ],
            weight_decay=0.0,
            betas=(0.9, 0.98),
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, in one order on every rank."""
        return list(self._named.values())

    def step(self, multiplier: float) -> None:
        """Clip each group's gradient by its norm, update with rates times `multiplier`, clear."""
        for group in self._adamw.param_groups:
            # By group: one norm over all would let the many leaves silence the few gates.
            nn.utils.clip_grad_norm_(group["params"], self._clip)
            group["lr"] = self._rates.of(group["name"]) * multiplier
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Parameters and both moments, by name."""
        tensors = {f"value/{name}": p.detach() for name, p in self._named.items()}
        for name, parameter in self._named.items():
            for key, value in self._adamw.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` gave; a checkpoint of other parameters is a KeyError."""
        with torch.no_grad():
            for name, parameter in self._named.items():
                parameter.copy_(tensors[f"value/{name}"])
                self._adamw.state[parameter] = {
                    key: tensors[f"{key}/{name}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
