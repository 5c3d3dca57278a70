"""Counts the kernels of a training step on a card, by method; writes them as a table.

    python -m bench.kernels.training_ops --out tests/results/training_ops.md

No card is needed: `support.placement.Card` plays one, and keeps a list of the operators on it.
Views and allocations start no kernel, and are left out. The step is that of a small random
Llama on 3 tasks, forward, backward and optimiser, at two depths: their difference is the cost of a
layer, and the rest is that of a step whatever the depth. Attention counts as the dozen operators
that a CPU takes for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.loop.optimiser import Optimiser
from polyrex.training.model.multi_task import MultiTaskModel
from support.card_operators import CUDA
from support.placement import Card, Launch
from support.small_model import SPECS, spec_id

DEPTHS = (2, 4)
TASKS = 3
EXAMPLES = [Example(row % TASKS, tuple(range(1, 9)), (7, 8)) for row in range(6)]
_START_NONE = tuple(f"aten::{name}" for name in ("empty", "new_empty", "_local_scalar_dense"))
"""Operators on the card that start no kernel."""


class Count(NamedTuple):
    """Kernels of a step: of each layer, of a step whatever the depth, and of the optimiser."""

    layer: float
    fixed: float
    optimiser: float


def count(step: Callable[[int], tuple[int, int]]) -> Count:
    """`step(depth)` gives the kernels of forward and backward, and those of the optimiser."""
    (shallow, optimiser), (deep, _) = (step(depth) for depth in DEPTHS)
    layer = (deep - shallow) / (DEPTHS[1] - DEPTHS[0])
    return Count(layer, shallow - DEPTHS[0] * layer, optimiser)


def count_method(spec: AdapterSpec) -> Count:
    """The kernels of a step that trains a method."""

    def step(depth: int) -> tuple[int, int]:
        with Card() as card:
            base = _llama(depth)
            model = MultiTaskModel(attach(base, spec, find_targets(base)), TASKS, seed=0)
            groups = model.parameter_groups()
            optimiser = Optimiser(groups, LearningRates())
            for parameter in optimiser.parameters:
                parameter.grad = torch.zeros_like(parameter.requires_grad_(True))
            optimiser.step(1.0)  # makes its state
            batch = model.collate(EXAMPLES, 0)
            with _recorded(card) as both_ways:
                model.loss(batch, sample=True).backward()  # type: ignore[no-untyped-call]
            with _recorded(card) as stepping:
                optimiser.step(1.0)
            return _kernels(both_ways), _kernels(stepping)

    return count(step)


def count_base() -> Count:
    """Those of the base model alone, whose gradients go down to its first layer."""

    def step(depth: int) -> tuple[int, int]:
        with Card() as card:
            base: Any = _llama(depth)
            hidden = torch.zeros(6, 10, base.config.hidden_size).to(CUDA).requires_grad_(True)
            with _recorded(card) as both_ways:
                out = base.base_model(inputs_embeds=hidden, use_cache=False).last_hidden_state
                out.sum().backward()
            return _kernels(both_ways), 0

    return count(step)


def _llama(layers: int) -> torch.nn.Module:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    return model.eval().requires_grad_(False).to(CUDA)


@contextmanager
def _recorded(card: Card) -> Iterator[list[Launch]]:
    """What is launched within this context."""
    with card.decode_step() as launches, card.sync_allowed():
        yield launches


def _kernels(launches: Sequence[Launch]) -> int:
    return sum(not each.operator.startswith(_START_NONE) for each in launches)


def table() -> str:
    """The counts of every method as Markdown."""
    base = count_base()
    lines = [
        "# Kernels of a training step",
        "",
        "Written by `python -m bench.kernels.training_ops --out tests/results/training_ops.md`;",
        "seven adapted modules a layer, 3 tasks in a batch, forward and backward.",
        f"The base model alone: {base.layer:g} a layer.",
        "",
        "| method | adapters, a layer | composing and the rest, a step | optimiser, a step |",
        "|---|---:|---:|---:|",
    ]
    for spec in SPECS:
        found = count_method(spec)
        own = found.layer - base.layer
        lines.append(f"| {spec_id(spec)} | {own:g} | {found.fixed:g} | {found.optimiser:g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file")
    text = table()
    parser.parse_args().out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
