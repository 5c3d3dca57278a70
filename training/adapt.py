"""Few-shot adaptation: a router (or more) for a new task, on an inventory that is there already."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from polyrex.adapters.errors import SpecError
from polyrex.adapters.files.inventory import (
    Inventory,
    load_experts,
    read_inventory,
    write_inventory,
)
from polyrex.adapters.files.router import RouterMetadata, read_router, write_router
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.training.data.batches import Example, by_length, encode_rows
from polyrex.training.data.tasks import Row, load_tasks, prompt_of
from polyrex.training.loop.loop import LoopConfig, StepRecord, current_commit, run, write_record
from polyrex.training.loop.optimiser import Groups, LearningRates
from polyrex.training.model.frozen import upper_alone
from polyrex.training.model.multi_task import MultiTaskModel

from .train import example_prompt, use_eager_attention

logger = logging.getLogger(__name__)

AdaptMode = Literal["routing", "token-routers", "modules", "both"]

_TRAINED: dict[AdaptMode, frozenset[str]] = {
    "routing": frozenset({"routing"}),
    "token-routers": frozenset({"token_routers"}),
    "modules": frozenset({"experts", "gates", "token_routers"}),
    "both": frozenset({"experts", "gates", "token_routers", "routing"}),
}
"""The groups of `MultiTaskModel.parameter_groups` that a mode trains."""

ADAPTATION = LoopConfig(steps=60, sample_routing=False, warmup=5, rates=LearningRates(routing=0.5))
"""How a new task is fitted. Without routing noise: 32 rows are noise enough."""


@dataclass(frozen=True)
class AdaptConfig:
    """What is adapted: the task's routing alone (the inventory stays as it is), the routers of
    tokens alone, the modules alone (their routing uniform), or modules and routing. `rows` train
    rows of the task are used, drawn by the loop's seed."""

    data: Path
    task: str
    inventory: Path
    out: Path
    mode: AdaptMode = "routing"
    rows: int = 32
    base: str = DEFAULT_BASE
    loop: LoopConfig = ADAPTATION
    dtype: str = "bfloat16"


def adapt(config: AdaptConfig) -> Path:
    """Adapt to one task and write its router (and, unless mode is routing, a new inventory).

    Returns the router's path. Raises DataError, FileError or SpecError on bad input.
    """
    (task,) = load_tasks(config.data, (config.task,))
    inventory = read_inventory(config.inventory)
    path = resolve_base(config.base)
    base, tokenizer = load_base(path, getattr(torch, config.dtype)), load_tokenizer(path)
    use_eager_attention(base)
    adapted = load_experts(inventory, base)
    rows = few_shot_rows(task.rows["train"], config.rows, config.loop.seed)
    prompts = [prompt_of(task.instruction, row) for row in rows]
    started = time.time()
    start, logits, losses = fit(
        adapted,
        encode_rows(tokenizer, task.instruction, rows),
        tokenizer.eos_token_id,
        config.loop,
        mode=config.mode,
        starts=starts_of(inventory, prompts) if "routing" in _TRAINED[config.mode] else {},
    )
    config.out.mkdir(parents=True, exist_ok=True)
    sha256 = inventory.sha256
    if config.mode != "routing":
        sha256 = write_inventory(config.out / "inventory.safetensors", adapted)
    metadata = RouterMetadata(
        inventory_sha256=sha256,
        task=task.name,
        description=task.instruction,
        provenance={
            "trained": f"adapted ({config.mode})",
            "rows": len(rows),
            "started_from": start,
            "commit": current_commit(),
            "example_prompt": example_prompt(task),
        },
    )
    router = config.out / f"{task.name}.safetensors"
    write_router(router, logits, inventory.spec, metadata)
    record = {
        "config": {"mode": config.mode, "rows": len(rows), "loop": asdict(config.loop)},
        "task": task.name,
        "started_from": start,
        "inventory_sha256": inventory.sha256,
        "commit": current_commit(),
        "seconds": round(time.time() - started),
        "losses": [round(loss, 4) for loss in losses],
    }
    write_record(config.out / f"{task.name}.json", record)
    return router


def few_shot_rows(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows drawn without replacement, or all where there are fewer."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order[:count].tolist()]


def starts_of(inventory: Inventory, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """Where the routing of a new task may start from: its neighbours' and, where the inventory has
    an intuition, `own`, the mean intuition of its prompts.

    Raises FileError where a router or the sentence encoder cannot be read.
    """
    starts = dict(neighbours(inventory))
    if inventory.intuition is not None:
        encoder = SentenceEncoder.of(inventory.intuition.encoder)
        starts["own"] = inventory.intuition.of(encoder.embed(prompts)).mean(0, keepdim=True)
    return starts


def neighbours(inventory: Inventory) -> Mapping[str, Tensor]:
    """The logits of the routers that lie beside an inventory, by task: places to start from."""
    folder = inventory.path.parent / "routers"
    return {
        path.stem: read_router(path.read_bytes(), str(path), inventory).logits
        for path in sorted(folder.glob("*.safetensors"))
    }


def fit(
    adapted: AdaptedModel,
    examples: Sequence[Example],
    pad: int,
    loop: LoopConfig,
    *,
    mode: AdaptMode = "routing",
    starts: Mapping[str, Tensor] | None = None,
    above: int = 0,
    progress: Callable[[StepRecord], None] | None = None,
) -> tuple[str, Tensor, list[float]]:
    """Fit one router to rows: (where it started, logits [groups, R], the losses).

    Routing starts from the router among `starts` under which the rows cost least, or from uniform
    weights where those cost less still. `pad` is the token that fills up batches; `progress` is
    told of every step. With `above`, the routing of the first so many decoder layers stays where it
    started, so that what they make of the rows is computed once.

    Raises SpecError where the method has nothing to fit in that mode, or where what is fitted
    reaches below `above`.
    """
    model = MultiTaskModel(adapted, 1, seed=loop.seed)
    groups = model.parameter_groups()
    if mode == "both" and not groups["routing"]:
        raise SpecError(f"{adapted.spec.method} has no routing to adapt; use mode modules")
    chosen: Groups = {key: groups[key] for key in groups if key in _TRAINED[mode]}
    if not any(chosen.values()):
        raise SpecError(f"{adapted.spec.method} has no {mode} to adapt; use mode modules")
    if above and (mode != "routing" or adapted.spec.granularity == "model"):
        raise SpecError(f"{mode} by {adapted.spec.granularity} is fitted on all layers, or on none")
    for key, members in groups.items():
        for _, parameter in members:
            parameter.requires_grad_(key in chosen)
    name = _choose_start(model, examples, pad, dict(starts or {}))
    start = model.logits[0].detach().clone()
    with upper_alone(adapted, above, examples, start) if above else nullcontext(examples) as rows:
        curve = run(model, chosen, rows, loop, pad=pad, title="adapting", progress=progress)
    return name, model.logits[0].detach().clone(), [record.loss for record in curve]


FIRST_LOOK = 3
"""Rows that all starts are tried on; the best quarter of them then see three times as many."""


@torch.no_grad()
def _choose_start(
    model: MultiTaskModel, examples: Sequence[Example], pad: int, starts: dict[str, Tensor]
) -> str:
    """Put the start under which the rows cost least into the model; returns its name.

    By halving: few rows tell the hopeless ones, and the last two have seen every row.
    """
    starts = {"uniform": model.logits[0].clone(), **starts}
    names, rows = list(starts), FIRST_LOOK

    def cost(name: str) -> float:
        model.logits[0] = starts[name]
        return sum(model.loss(batch).item() for batch in batches)

    while len(names) > 1:
        seen = examples[:rows]
        parts = by_length([len(example) for example in seen], batch_tokens=512)
        batches = [model.collate([seen[i] for i in part], pad, rows=len(seen)) for part in parts]
        names = sorted(names, key=cost)
        kept = max(2, -(-len(names) // 4)) if rows < len(examples) else 1
        names, rows = names[:kept], 3 * rows
    logger.info("starting from %s", names[0])
    model.logits[0] = starts[names[0]]
    return names[0]
