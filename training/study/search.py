"""The study's search for the learning rates of training, and of adapting, a family of methods.

Rates are tried one after another until the loss on valid rows rises.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyrex.adapters.files.bundle import Bundle
from polyrex.adapters.files.inventory import Inventory, read_inventory
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.methods.registry import method_class
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.training.adapt import AdaptMode, fit
from polyrex.training.data.batches import Example
from polyrex.training.data.tasks import Task
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.multi_task import Groups, MultiTaskModel
from polyrex.training.records import write_record

from .setup import Bench
from .variants import (
    ADAPT_ROUTING,
    ADAPT_SCALES,
    RATES,
    TRAIN_ROUTING,
    StudyConfig,
    Variant,
    cell,
)


@dataclass(frozen=True)
class Search:
    """A search and its cell, which grows with every rate that is tried."""

    path: Path
    done: list[dict[str, Any]]

    @classmethod
    def open(cls, path: Path) -> Search:
        """The search of a cell, with what it has tried so far."""
        return cls(path, json.loads(path.read_text())["tried"] if path.exists() else [])

    def run(
        self,
        candidates: Sequence[LearningRates],
        cost: Callable[[LearningRates], float],
        **about: Any,
    ) -> None:
        """Try the candidates that are missing until one is worse than the one before; `about` is
        also recorded."""
        for rates in candidates[len(self.done) :]:
            if len(self.done) > 1 and self.done[-1]["valid_loss"] > self.done[-2]["valid_loss"]:
                break
            self.done.append({"rates": asdict(rates), "valid_loss": round(cost(rates), 4)})
            write_record(self.path, about | {"tried": self.done})

    @property
    def best_entry(self) -> dict[str, Any]:
        """The entry with the lowest valid loss."""
        return min(self.done, key=lambda entry: float(entry["valid_loss"]))

    @property
    def best(self) -> LearningRates:
        """The rates with the lowest valid loss."""
        return LearningRates(**self.best_entry["rates"])


def search_rates(config: StudyConfig, variant: Variant) -> None:
    """Train a variant briefly at each of its family's rates and, if tasks are routed, then at other
    rates for routing."""

    def cost(rates: LearningRates) -> float:
        bench = Bench.open(config)
        model = bench.fresh(variant)
        examples = bench.examples("train", model.intuition)
        train_adapters(bench, model, variant, examples, replace(config.search, rates=rates), None)
        return mean_loss(model, bench.examples("valid", model.intuition))

    about = {"variant": variant.name, "steps": config.search.steps}
    found = Search.open(cell(config, "search", variant.family))
    found.run(RATES[variant.family], cost, **about)
    if variant.routes_tasks and method_class(variant.spec.method).routing_size(variant.spec):
        routing = Search.open(_routing_cell(config, variant))
        if not routing.done:
            routing.done.append(found.best_entry)
        rates = [replace(found.best, routing=rate) for rate in TRAIN_ROUTING]
        routing.run([found.best, *rates], cost, **about)


def _routing_cell(config: StudyConfig, variant: Variant) -> Path:
    return cell(config, "search", f"{variant.family}-routing")


def best_rates(config: StudyConfig, variant: Variant) -> LearningRates:
    """The rates of training that the search found for the variant's family."""
    routing = Search.open(_routing_cell(config, variant))
    return (routing if routing.done else Search.open(cell(config, "search", variant.family))).best


def train_adapters(
    bench: Bench,
    model: MultiTaskModel,
    variant: Variant,
    examples: Sequence[Example],
    loop: LoopConfig,
    checkpoint: Path | None,
    progress: Callable[[StepRecord], None] | None = None,
) -> tuple[Groups, list[StepRecord]]:
    """Train a variant; returns the trained parameters and the curve. `progress` as in `run`."""
    groups = model.parameter_groups(routing=variant.routes_tasks)
    if not variant.routes_tasks:
        torch.nn.init.zeros_(model.logits)
        model.logits.requires_grad_(False)
    pad = bench.tokenizer.eos_token_id
    return groups, run(
        model,
        groups,
        examples,
        loop,
        pad=pad,
        checkpoint=checkpoint,
        title=variant.name,
        progress=progress,
    )


@torch.no_grad()
def mean_loss(model: MultiTaskModel, examples: Sequence[Example], batch_rows: int = 32) -> float:
    """The mean loss of rows, computed in batches of similar lengths."""
    ordered = sorted(examples, key=len)
    batches = [ordered[i : i + batch_rows] for i in range(0, len(ordered), batch_rows)]
    total = sum(model.loss(model.collate(batch, 0)).item() * len(batch) for batch in batches)
    return total / len(ordered)


@dataclass(frozen=True)
class Trained:
    """A trained variant, which can be adapted many times, each time from its trained state."""

    bench: Bench
    inventory: Inventory
    adapted: AdaptedModel
    states: list[dict[str, Any]]  # of every layer's experts

    @classmethod
    def load(cls, bench: Bench, path: Path) -> Trained:
        """Attach the inventory at `path` to the bench's base model."""
        inventory = read_inventory(path)
        adapted = bench.load(inventory)
        states = [deepcopy(layer.experts.state_dict()) for layer in adapted.layers]
        return cls(bench, inventory, adapted, states)

    def adapt(
        self, task: Task, seed: int, mode: AdaptMode, rates: LearningRates
    ) -> tuple[str, Tensor, list[float]]:
        """Adapt to a task from the few rows that a seed draws; returns what `fit` returns."""
        for layer, state in zip(self.adapted.layers, self.states, strict=True):
            layer.experts.load_state_dict(state)
        starts = dict(Bundle(self.inventory).logits()) if mode in ("routing", "both") else {}
        if self.inventory.intuition is not None:
            starts["own"] = self.bench.mean_intuition(self.inventory.intuition, task, seed)
        loop = replace(self.bench.config.adapt, seed=seed, rates=rates)
        pad = self.bench.tokenizer.eos_token_id
        rows = self.bench.few_shot(task, seed)
        return fit(self.adapted, rows, pad, loop, mode=mode, starts=starts)

    def valid_loss(self, task: Task, logits: Tensor) -> float:
        """The loss on a task's valid rows under a router's logits, with the modules as they were
        adapted last."""
        model = MultiTaskModel(self.adapted, 1, seed=0)
        model.logits.data[0] = logits
        return mean_loss(model, self.bench.valid(task))


def adaptation_rates(trained: Trained, variant: Variant, mode: AdaptMode) -> LearningRates:
    """The rates at which a family adapts best in a mode; its first variant searches for them.

    For modules and routing together, the rates are those of each alone.
    """
    config = trained.bench.config
    if mode == "both":
        routing = adaptation_rates(trained, variant, "routing").routing
        return replace(adaptation_rates(trained, variant, "modules"), routing=routing)
    rates = best_rates(config, variant)
    if mode == "routing":
        candidates = [replace(rates, routing=rate) for rate in ADAPT_ROUTING]
    else:
        candidates = [_scaled(rates, scale) for scale in ADAPT_SCALES]
    tasks = [task for task in trained.bench.held_out if task.name in config.searched]

    def cost(rates: LearningRates) -> float:
        total = 0.0
        for task in tasks:
            _, logits, _ = trained.adapt(task, config.seeds[0], mode, rates)
            total += trained.valid_loss(task, logits)
        return total / len(tasks)

    found = Search.open(cell(config, "search", f"adapt-{variant.family}-{mode}"))
    found.run(candidates, cost, variant=variant.name, tasks=list(config.searched))
    return found.best


def _scaled(rates: LearningRates, scale: float) -> LearningRates:
    return replace(
        rates,
        experts=scale * rates.experts,
        gates=scale * rates.gates,
        token_routers=scale * rates.token_routers,
    )
