"""The variants of methods that the comparison study compares, and how long each part runs.

All variants see the same rows in the same order for the same number of steps. Only learning rates
differ; the same small search chooses them for each family of methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.adapters.spec import AdapterSpec, Granularity, TrexForm
from polyrex.training.adapt import ADAPTATION, AdaptMode
from polyrex.training.intuition.cluster import CENTROIDS
from polyrex.training.loop.run import LoopConfig

UPPER_THIRD = r"model\.layers\.2\d\..*_proj"
"""The projections of the last ten of SmolLM2-135M's thirty layers."""


@dataclass(frozen=True)
class Variant:
    """A row of the study's tables; `modes` are the ways in which it is adapted to new tasks.

    Variants of one `family` share the learning rates that the search finds for its first member.
    """

    name: str
    family: str
    spec: AdapterSpec
    modes: tuple[AdaptMode, ...]
    routes_tasks: bool = True  # False if training learns nothing that belongs to a single task


_ALL: tuple[AdaptMode, ...] = ("routing", "modules", "both")
_TOKENS: tuple[AdaptMode, ...] = ("token-routers",)


def _leaves(
    name: str,
    *,
    experts: int,
    order: int = 2,
    granularity: Granularity = "module",
    modes: tuple[AdaptMode, ...] = ("routing",),
) -> Variant:
    method = f"tensorpoly-{name[0]}"
    spec = AdapterSpec(method, experts=experts, order=order, granularity=granularity)
    return Variant(f"tensorpoly-{name}", "leaves", spec, modes)


def _trex(rank: int, rank_out: int | None = None, form: TrexForm = "mix") -> AdapterSpec:
    return AdapterSpec(
        "trex", rank, rank_out=rank_out, form=form, granularity="model", intuition=CENTROIDS
    )


VARIANTS = (
    Variant("lora", "lora", AdapterSpec("lora"), ("modules",)),
    _leaves("1-e8-n2", experts=8, modes=_ALL),
    Variant("poly", "poly", AdapterSpec("poly", experts=8), _ALL),
    Variant("trex-mix", "trex", AdapterSpec("trex", rank=4, rank_out=3), _TOKENS, False),
    Variant("molora", "molora", AdapterSpec("molora", rank=4, experts=8), _TOKENS),
    Variant("mhr", "poly", AdapterSpec("mhr", experts=8, splits=8), _ALL),
    _leaves("2", experts=8),
    Variant("trex-diagonal", "trex", AdapterSpec("trex", rank=7, form="diagonal"), _TOKENS, False),
    Variant("trex-mix-intuition", "trex", _trex(rank=4, rank_out=3), ("routing",), False),
    Variant("tlora", "leaves", AdapterSpec("tlora"), ("modules",)),
    Variant("sira", "molora", AdapterSpec("sira", rank=4, experts=8), _TOKENS),
    Variant("trex-diagonal-intuition", "trex", _trex(rank=7, form="diagonal"), ("routing",), False),
    _leaves("1-e20-n2", experts=20),
    _leaves("1-e8-n4", experts=8, order=4),
    _leaves("1-e20-n4", experts=20, order=4),
    _leaves("x", experts=4),
    _leaves("1-e8-n2-block", experts=8, granularity="block"),
    _leaves("1-e8-n4-block", experts=8, order=4, granularity="block"),
)

_BY_TOKEN = tuple(
    LearningRates(experts=rate, token_routers=rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)
)
_LOW_RANK = tuple(LearningRates(experts=rate) for rate in (2e-3, 6e-3, 2e-2, 6e-2))
_LEAVES = (
    (1e-2, 1e-3),
    (3e-2, 1e-3),
    (3e-2, 3e-3),
    (3e-2, 1e-2),
    (1e-1, 1e-2),
    (1e-1, 3e-2),
    (3e-1, 3e-2),
    (3e-1, 1e-1),
)
RATES = {
    "lora": _LOW_RANK,
    "poly": _LOW_RANK,
    "molora": _BY_TOKEN,
    "trex": _BY_TOKEN,
    "leaves": tuple(LearningRates(experts=experts, gates=gates) for experts, gates in _LEAVES),
}
"""The rates that the search tries for each family, in this order while they improve. LoRA and Poly
divide their delta by the rank; MoLoRA and T-REX do not."""

TRAIN_ROUTING = (0.2, 0.8, 3.0)
"""The rates for the tasks' routing that are tried after that, if it is trained."""

ADAPT_ROUTING = (0.1, 0.5, 2.0, 8.0)
ADAPT_SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""What the search for rates of adaptation tries in the same way: rates for routing, and factors on
the rates of training if modules or token routers are adapted."""

SEARCH = LoopConfig(steps=120, sample_routing=False)
TRAIN = LoopConfig(steps=320, sample_routing=False)
ADAPT = replace(ADAPTATION, steps=20, batch_rows=8)

HELD_OUT = ("epistemic", "social_iqa", "winowhy", "wic_wn", "plural")
"""Of each kind that T0 holds out (inference, completion, coreference, word sense), the task with
the most rows whose licence allows redistribution; and one task with free answers instead of
options."""

REPEATED = ("lora", "mhr", "trex-diagonal", "tensorpoly-x")
TRAIN_SEEDS = (0, 1, 2, 3)
"""Variants that are trained and scored with each of these seeds, to show how much of a difference
is chance. All others, and all that is adapted, use the first seed."""

SEARCHED = ("plural", "epistemic")
"""The held_out tasks whose valid rows the search for rates of adaptation uses."""


@dataclass(frozen=True)
class StudyConfig:
    """The settings of a study. `out` is for the results, which are small; `work` is for files that
    can be made again."""

    data: Path
    out: Path
    work: Path
    base: str = DEFAULT_BASE
    targets: str = UPPER_THIRD
    lower_layers: int = 20
    dtype: str = "bfloat16"
    device: str = "auto"
    """As pick_device reads it. It is no part of the plan: cells of one study may be computed on
    different devices."""
    variants: Sequence[Variant] = VARIANTS
    held_out: tuple[str, ...] = HELD_OUT
    searched: tuple[str, ...] = SEARCHED
    rows: int = 32
    test_rows: int = 160
    """The most test rows of a task that are used, from the first on."""
    repeated: tuple[str, ...] = REPEATED
    train_seeds: tuple[int, ...] = TRAIN_SEEDS
    seeds: tuple[int, ...] = (0, 1, 2)
    search: LoopConfig = SEARCH
    train: LoopConfig = TRAIN
    adapt: LoopConfig = ADAPT
    workers: int = 2

    def seeds_of(self, variant: Variant) -> tuple[int, ...]:
        """The seeds that a variant is trained with."""
        return self.train_seeds if variant.name in self.repeated else self.train_seeds[:1]


def run_name(config: StudyConfig, variant: Variant, seed: int) -> str:
    """The name of a variant's training run: the variant's, followed by any seed but the first."""
    return variant.name if seed == config.train_seeds[0] else f"{variant.name}-seed{seed}"


def cell(config: StudyConfig, *names: str) -> Path:
    """The path of a cell's result, whose folder is created."""
    path = config.out.joinpath(*names[:-1], f"{names[-1]}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
