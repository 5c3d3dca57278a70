"""What an adapter is made of: the method with its hyperparameters, and the modules it sits on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import SpecError

Granularity = Literal["module", "block", "model"]
Norm = Literal["layer", "none"]
TrexForm = Literal["mix", "diagonal", "static"]


@dataclass(frozen=True)
class AdapterSpec:
    """A method and its hyperparameters; what a method does not use stays at its default.

    `rank` is the LoRA rank r, and the number I of rank-one experts on the input side of T-REX;
    `rank_out` is J, the number on its output side. `granularity` says how many modules share one
    row of routing logits: each its own (`module`, the papers' fine), one a transformer block, or
    one for the model. `intuition` is the number of centroids that T-REX knows texts by; a router
    then holds a text's (or a task's) cosines with them, for the whole model.
    """

    method: str
    rank: int = 16
    experts: int = 1
    order: int = 2
    splits: int = 1
    norm: Norm = "layer"
    alpha: float | None = None
    form: TrexForm = "mix"
    rank_out: int | None = None
    top_k: int | None = None
    granularity: Granularity = "module"
    intuition: int | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "experts", "order", "splits", "rank_out", "top_k", "intuition"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{self.method}: {name} must be at least 1, got {value}")
        for name, allowed in (
            ("norm", ("layer", "none")),
            ("form", ("mix", "diagonal", "static")),
            ("granularity", ("module", "block", "model")),
        ):
            if getattr(self, name) not in allowed:
                raise SpecError(
                    f"{self.method}: {name} must be one of {', '.join(allowed)}, "
                    f"got {getattr(self, name)!r}"
                )

    def to_json(self) -> str:
        """The hyperparameters as one line of JSON, as it stands in file metadata."""
        values = asdict(self)
        if self.intuition is None:
            del values["intuition"]  # files from before there was one say the same
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdapterSpec:
        """Read what `to_json` wrote; raises SpecError on fields that this version does not know."""
        try:
            values: dict[str, Any] = json.loads(text)
            unknown = set(values) - {f.name for f in fields(cls)}
            if unknown:
                raise SpecError(f"unknown hyperparameters {', '.join(sorted(unknown))}")
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise SpecError(f"hyperparameters are not readable: {error}") from error


@dataclass(frozen=True)
class TargetModule:
    """A linear layer of the base model that is adapted, named as in the checkpoint."""

    name: str
    d_in: int
    d_out: int


_BLOCK = re.compile(r"\.(\d+)\.")


def routing_groups(targets: tuple[TargetModule, ...], granularity: Granularity) -> Tensor:
    """For each target module, the row of the router that it reads: [M], int64.

    `block` groups modules by everything in their name up to the first number
    (`model.layers.3.` , `encoder.block.3.`), in order of first appearance.
    """
    if granularity == "model":
        return torch.zeros(len(targets), dtype=torch.int64)
    if granularity == "module":
        return torch.arange(len(targets))
    seen: dict[str, int] = {}
    groups = []
    for target in targets:
        match = _BLOCK.search(target.name)
        key = target.name[: match.end()] if match else target.name
        groups.append(seen.setdefault(key, len(seen)))
    return torch.tensor(groups)
