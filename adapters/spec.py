"""The make-up of an adapter: a method with its hyperparameters, and the target modules."""

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
    """A method and its hyperparameters; a method leaves the fields that it does not use alone."""

    method: str
    """The adapter method."""
    rank: int = 16
    """LoRA rank r; for trex the number I of rank-one experts on the input side."""
    experts: int = 1
    """Experts E of a module."""
    order: int = 2
    """Tensor order N: how many leaves are multiplied out to a row."""
    splits: int = 1
    """Blocks S that mhr cuts both dimensions into."""
    norm: Norm = "layer"
    """Normalisation of tensor products: layer, or none."""
    alpha: float | None = None
    """LoRA's alpha, which the delta is multiplied by and the rank divides; 1 if not given."""
    form: TrexForm = "mix"
    """Form of trex: mix gates every pair of experts, diagonal only equal ones, static per task."""
    rank_out: int | None = None
    """For trex, the number J of rank-one experts on the output side; as many as I if not given."""
    top_k: int | None = None
    """Gates that sira keeps for a token; 6 if not given."""
    granularity: Granularity = "module"
    """Which modules share a row of routing logits: none (module), those of a block, or all (model).
    """
    intuition: int | None = None
    """Centroids of T-REX's intuition; the paper has 32. A router then holds a text's (or a task's)
    cosines with them, for the whole model. No intuition if not given."""

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

    @property
    def outer_rank(self) -> int:
        """J, the number of rank-one experts on the output side of T-REX."""
        return self.rank if self.rank_out is None else self.rank_out

    @property
    def gates(self) -> int:
        """How many gates a module of T-REX has: I * J pairs, or I in the diagonal form."""
        return self.rank if self.form == "diagonal" else self.rank * self.outer_rank

    def to_json(self) -> str:
        """The hyperparameters as one line of JSON, as files store them."""
        values = asdict(self)
        if self.intuition is None:
            del values["intuition"]  # older files have no such key
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdapterSpec:
        """The inverse of `to_json`; raises SpecError on fields that this version does not know."""
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
