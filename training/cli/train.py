"""The commands `polyrex train`, `adapt` and `evaluate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from polyrex.adapters.errors import DeviceError
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.base_model import DEFAULT_BASE, Quantisation
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.adapt import ADAPTATION, AdaptConfig
from polyrex.training.adapt import adapt as run_adaptation
from polyrex.training.data.tasks import Split
from polyrex.training.evaluation.report import evaluate_tasks, summary, table
from polyrex.training.loop.run import LoopConfig
from polyrex.training.train import TrainConfig
from polyrex.training.train import train as run_training

from .options import ADAPTER, LOOP, RATE_FLAGS, RATES, options, reads

Base = Annotated[str, Parameter(help="A base model: a name, or its folder.")]
Inventory = Annotated[Path, Parameter(help="An inventory's file; its routers lie beside it.")]
Dtype = Annotated[
    Literal["bfloat16", "float32"], Parameter(help="Data type that the model computes in.")
]
Device = Annotated[
    str, Parameter(help="cpu, cuda, cuda:N, or auto, which is CUDA where there is one.")
]

_METHOD = "tensorpoly-1"
_EXPERTS = 8
"""Experts of a module, for methods that have several."""

_RATES_BY_METHOD = options(LearningRates, dict.fromkeys(RATE_FLAGS), names=RATE_FLAGS, group=RATES)
_TRAIN = options(
    TrainConfig,
    {
        "spec": options(AdapterSpec, {"method": _METHOD, "experts": None}, group=ADAPTER),
        "loop": options(LoopConfig, {"steps": 0, "rates": _RATES_BY_METHOD}, group=LOOP),
    },
    names={"tasks": "task"},
)
_ADAPT = options(
    AdaptConfig,
    {
        "loop": options(
            LoopConfig,
            vars(ADAPTATION)
            | {
                "rates": options(
                    LearningRates, vars(ADAPTATION.rates), names=RATE_FLAGS, group=RATES
                )
            },
            group=LOOP,
        )
    },
)


@reads(config=_TRAIN)
def train(*, config: TrainConfig) -> None:
    """Train an inventory and one router for each task, on a frozen base model.

    Where none are given, experts (8 where the method has any) and learning rates are the method's.
    """
    log_to_terminal()
    spec = vars(config.spec)
    method = method_class(config.spec.method)
    if spec["experts"] is None:
        spec = spec | {"experts": _EXPERTS if "experts" in method.uses else AdapterSpec.experts}
    rates = {name: rate for name, rate in vars(config.loop.rates).items() if rate is not None}
    config = TrainConfig(
        **vars(config)
        | {
            "spec": AdapterSpec(**spec),
            "loop": LoopConfig(**vars(config.loop) | {"rates": replace(method.rates, **rates)}),
            "role": None if config.tasks else config.role,
        }
    )
    with _within_memory():
        print(f"wrote {run_training(config)}")


@reads(config=_ADAPT)
def adapt(*, config: AdaptConfig) -> None:
    """Adapt a new task from a few rows; by default only its routing, the inventory unchanged."""
    log_to_terminal()
    with _within_memory():
        print(f"wrote {run_adaptation(config)}")


def evaluate(
    *,
    data: Annotated[Path, Parameter(help="Folder with manifest.json and tasks/NAME.jsonl.")],
    inventory: Inventory,
    out: Annotated[Path, Parameter(help="JSON file for the scores.")],
    task: Annotated[
        list[str] | None, Parameter(help="A task; repeat it for more. All if not given.")
    ] = None,
    split: Annotated[Split, Parameter(help="Which rows.")] = "test",
    base: Base = DEFAULT_BASE,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    quantize: Annotated[
        Quantisation | None,
        Parameter(
            help="Bits of the frozen layers' weights: 8bit needs torchao, 4bit bitsandbytes."
        ),
    ] = None,
) -> None:
    """Score tasks by the base model alone and under the routers that lie beside an inventory."""
    log_to_terminal()
    reports = evaluate_tasks(
        data,
        inventory,
        out,
        base=base,
        tasks=task,
        split=split,
        dtype=dtype,
        device=device,
        quantize=quantize,
    )
    print(table(reports))
    print(json.dumps(summary(reports)))


@contextmanager
def _within_memory() -> Iterator[None]:
    """Within it, a card that is full raises DeviceError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            "the card has too little memory; --gradient-checkpointing, --accumulate and --quantize "
            "take less, and polyrex plan --train predicts how much"
        ) from error


def log_to_terminal() -> None:
    """Show what a command does meanwhile."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
