"""Trains many LoRAs for `polyrex compress`, one for each task and seed, as PEFT writes them.

Each starts from its own random A and sees its own rows: they share nothing but the base model. They
sit on the upper third of its layers; the activations below are computed once.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from polyrex.adapters.methods.composed import LowRank
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.peft.lora_checkpoint import write_lora
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.adapt import ADAPTATION, fit
from polyrex.training.data.tasks import load_tasks
from polyrex.training.model.frozen import cut
from polyrex.training.study.setup import Bench
from polyrex.training.study.variants import StudyConfig

logger = logging.getLogger(__name__)

SPEC = AdapterSpec("lora", rank=8, alpha=16.0)
LOOP = replace(ADAPTATION, steps=20, batch_rows=8, rates=LearningRates(experts=6e-3))
ROWS = 48


def train_loras(data: Path, out: Path, work: Path, seeds: Sequence[int]) -> None:
    """Train the LoRAs that are missing in `out`, each in a folder `TASK-SEED`."""
    names = tuple(task.name for task in load_tasks(data))
    bench = Bench.open(StudyConfig(data, out, work, held_out=names, rows=ROWS))
    adapted = attach(bench.base, SPEC, find_targets(bench.base, bench.config.targets))
    examples = {(t.name, seed): bench.few_shot(t, seed) for t in bench.held_out for seed in seeds}
    cut(bench.base, bench.config.lower_layers)
    for number, ((name, seed), rows) in enumerate(examples.items()):
        folder = out / f"{name}-{seed}"
        if folder.exists():
            continue
        generator = torch.Generator().manual_seed(number)
        for layer in adapted.layers:
            layer.experts.reset(generator)
        loop = replace(LOOP, seed=seed)
        _, _, losses = fit(adapted, rows, bench.tokenizer.eos_token_id, loop, mode="modules")
        write_lora(folder, modules_of(adapted), bench.config.base)
        logger.info("%s: loss %.3f, then %.3f", folder.name, losses[0], losses[-1])


@torch.no_grad()
def modules_of(adapted: AdaptedModel) -> dict[str, LowRank]:
    """The LoRA of a model whose method is lora, by module."""
    found = {}
    for target, layer in zip(adapted.targets, adapted.layers, strict=True):
        operands = layer.experts.operands(torch.float32)
        composed = layer.experts.compose(operands, torch.ones(1, 1), torch.float32)
        assert isinstance(composed, LowRank)
        found[target.name] = composed
    return found


def main() -> None:
    """The first step of `make bench-compress`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the LoRAs")
    parser.add_argument("--work", type=Path, required=True, help="folder for caches")
    parser.add_argument("--seeds", type=int, default=5, help="LoRAs of each task")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train_loras(options.data, options.out, options.work, range(options.seeds))


if __name__ == "__main__":
    main()
