"""Few-shot adaptation: a router (or more) for a new task, on an inventory that is there already."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.attach import AdaptedModel
from polyrex.adapters.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.adapters.errors import SpecError
from polyrex.adapters.inventory import Inventory, load_experts, read_inventory, write_inventory
from polyrex.adapters.router_file import RouterMetadata, read_router, write_router

from .batches import Example, collate, encode_rows
from .data import Row, load_tasks
from .loop import LoopConfig, current_commit, run, write_record
from .model import MultiTaskModel
from .multi_task import example_prompt, use_eager_attention
from .optimiser import Groups, LearningRates

logger = logging.getLogger(__name__)

AdaptMode = Literal["routing", "modules", "both"]

ADAPTATION = LoopConfig(steps=60, sample_routing=False, warmup=5, rates=LearningRates(routing=0.1))
"""How a new task is fitted. Without routing noise: 32 rows are noise enough."""


@dataclass(frozen=True)
class AdaptConfig:
    """What is adapted: the routing alone (the inventory stays as it is), the modules alone (their
    routing uniform), or both. `rows` train rows of the task are used, drawn by the loop's seed."""

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
    started = time.time()
    start, logits, losses = fit(
        adapted,
        tokenizer,
        task.instruction,
        rows,
        config.loop,
        mode=config.mode,
        starts=neighbours(inventory) if config.mode != "modules" else {},
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


def neighbours(inventory: Inventory) -> Mapping[str, Tensor]:
    """The logits of the routers that lie beside an inventory, by task: places to start from."""
    folder = inventory.path.parent / "routers"
    return {
        path.stem: read_router(path.read_bytes(), str(path), inventory).logits
        for path in sorted(folder.glob("*.safetensors"))
    }


def fit(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    rows: Sequence[Row],
    loop: LoopConfig,
    *,
    mode: AdaptMode = "routing",
    starts: Mapping[str, Tensor] | None = None,
) -> tuple[str, Tensor, list[float]]:
    """Fit one router to rows: (where it started, logits [groups, R], the losses).

    Routing starts from the router among `starts` under which the rows cost least, or from uniform
    weights where those cost less still. Raises SpecError where the method has no routing to fit.
    """
    model = MultiTaskModel(adapted, 1, seed=loop.seed)
    if mode != "modules" and not model.logits.numel():
        raise SpecError(f"{adapted.spec.method} has no routing to adapt; use mode modules")
    examples = encode_rows(tokenizer, instruction, rows)
    pad = tokenizer.eos_token_id
    name = _choose_start(model, examples, pad, dict(starts or {}))
    groups = model.parameter_groups()
    chosen: Groups = {
        key: members
        for key, members in groups.items()
        if mode == "both" or (key == "routing") == (mode == "routing")
    }
    for key, members in groups.items():
        for _, parameter in members:
            parameter.requires_grad_(key in chosen)
    if mode == "routing":
        adapted.prepare(adapted.model.dtype)  # type: ignore[arg-type]
    curve = run(model, chosen, examples, loop, pad=pad, title="adapting")
    return name, model.logits[0].detach().clone(), [record.loss for record in curve]


@torch.no_grad()
def _choose_start(
    model: MultiTaskModel, examples: Sequence[Example], pad: int, starts: dict[str, Tensor]
) -> str:
    if not starts:
        return "uniform"
    batch = collate(examples, pad)
    starts = {"uniform": model.logits[0].clone(), **starts}
    losses = {}
    for name, logits in starts.items():
        model.logits[0] = logits
        losses[name] = model.loss(batch).item()
    best = min(losses, key=losses.__getitem__)
    logger.info("starting from %s (loss %.3f)", best, losses[best])
    model.logits[0] = starts[best]
    return best
