"""Fitting a router to a few rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.adapt import ADAPTATION, fit
from polyrex.training.data.batches import Example, collate, encode_rows
from polyrex.training.data.tasks import load_tasks
from polyrex.training.model.multi_task import MultiTaskModel

LOOP = replace(ADAPTATION, steps=1, batch_rows=4, warmup=1)


def poly(base: Path) -> AdaptedModel:
    model = load_base(str(base), torch.float32)
    adapted = attach(model, AdapterSpec("poly", rank=3, experts=4), find_targets(model))
    with torch.no_grad():
        for layer in adapted.layers:
            generator = torch.Generator().manual_seed(layer.index)
            layer.experts.get_parameter("lora_b").normal_(generator=generator)
    return adapted


def test_fit_starts_from_the_router_under_which_the_rows_cost_least(
    tiny_base: Path, rows_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Whatever the order of the starts; what decides are all rows, in parts of any size."""
    (task,) = load_tasks(rows_folder, ("shout",))
    examples: list[Example] = encode_rows(tokenizer, task.instruction, task.rows["train"])
    adapted = poly(tiny_base)
    generator = torch.Generator().manual_seed(0)
    shape = adapted.routing_shape()
    starts = {f"random-{n}": 6 * torch.randn(shape, generator=generator) for n in range(9)}
    trained = replace(LOOP, steps=30, rates=replace(LOOP.rates, routing=0.5))
    _, starts["trained"], _ = fit(adapted, examples, 0, trained)
    model = MultiTaskModel(adapted, 1, seed=0)
    costs = {}
    for name, start in starts.items():
        model.logits.data[0] = start
        costs[name] = model.loss(collate(examples, 0)).item()
    assert min(costs, key=costs.__getitem__) == "trained"
    for ordered in (starts, dict(reversed(starts.items()))):
        found, _, losses = fit(adapted, examples, 0, LOOP, starts=ordered)
        assert found == "trained"
        assert losses[0] < min(cost for name, cost in costs.items() if name != "trained")
    del starts["trained"]
    assert fit(adapted, examples, 0, LOOP, starts=starts)[0] != "trained"
