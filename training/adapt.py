"""Few-shot adaptation of an existing inventory to a new task: a router, or more than that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from cyclopts.types import PositiveInt
from torch import Tensor

from polyrex.adapters.errors import SpecError
from polyrex.adapters.files.bundle import INVENTORY, Bundle
from polyrex.adapters.files.inventory import (
    Inventory,
    load_experts,
    read_inventory,
    write_inventory,
)
from polyrex.adapters.files.router import RouterMetadata, write_router
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import DEFAULT_BASE, Quantisation
from polyrex.adapters.model.devices import device_name, pick_device
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.rows import Row
from polyrex.training.data.batches import Example, by_length, encode_rows
from polyrex.training.data.tasks import example_prompt, load_tasks, prompt_of
from polyrex.training.intuition.cluster import mean_intuition
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.checkpointing import checkpoint_layers
from polyrex.training.model.frozen import upper_alone
from polyrex.training.model.loading import load_for_training
from polyrex.training.model.multi_task import Groups, MultiTaskModel

from .records import current_commit, write_record

logger = logging.getLogger(__name__)

AdaptMode = Literal["routing", "token-routers", "modules", "both"]

_TRAINED: dict[AdaptMode, frozenset[str]] = {
    "routing": frozenset({"routing"}),
    "token-routers": frozenset({"token_routers"}),
    "modules": frozenset({"experts", "gates", "token_routers"}),
    "both": frozenset({"experts", "gates", "token_routers", "routing"}),
}
"""The groups of `MultiTaskModel.parameter_groups` that each mode trains."""

ADAPTATION = LoopConfig(steps=60, sample_routing=False, warmup=5, rates=LearningRates(routing=0.5))
"""How a new task is fitted: without routing noise, as 32 rows are noisy enough."""


@dataclass(frozen=True)
class AdaptConfig:
    """The settings of adapting to a new task."""

    data: Path
    """Folder with manifest.json and tasks/NAME.jsonl."""
    task: str
    """The new task."""
    inventory: Path
    """File of the inventory; its routers lie beside it."""
    out: Path
    """Folder for results."""
    mode: AdaptMode = "routing"
    """The part that is trained: the task's routing, with the inventory unchanged; the token
    routers; the modules, with uniform routing; or both modules and routing."""
    rows: PositiveInt = 32
    """Train rows used; the seed determines which."""
    base: str = DEFAULT_BASE
    """Base model: a name, or its folder."""
    loop: LoopConfig = ADAPTATION
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type that the model computes in."""
    device: str = "auto"
    """Device to adapt on: cpu, cuda, cuda:N, or auto, which is CUDA where there is one."""
    quantize: Quantisation | None = None
    """Bits of the frozen layers' weights: 8bit needs torchao, 4bit bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again for its gradients, instead of keeping them."""


def adapt(config: AdaptConfig) -> Path:
    """Adapt to one task and write its router, and a new inventory unless the mode is routing.

    Returns the path of the router. Raises DataError, FileError or SpecError on bad input, and
    DeviceError where there is no such device.
    """
    device = pick_device(config.device)
    if config.loop.steps < 1:
        raise SpecError(f"adapting takes at least 1 step, got {config.loop.steps}")
    (task,) = load_tasks(config.data, (config.task,))
    inventory = read_inventory(config.inventory)
    base, tokenizer = load_for_training(config.base, config.dtype, device, config.quantize)
    if config.gradient_checkpointing:
        checkpoint_layers(base)
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
        sha256 = write_inventory(config.out / INVENTORY, adapted)
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
        "config": {
            "mode": config.mode,
            "rows": len(rows),
            "loop": asdict(config.loop),
            "dtype": config.dtype,
            "device": device_name(device),
            "quantize": config.quantize,
        },
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
    """Draw `count` rows without replacement, or all of them if there are fewer."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order[:count].tolist()]


def starts_of(inventory: Inventory, prompts: Sequence[str]) -> Mapping[str, Tensor]:
    """Candidates for the initial routing of a new task, by name: the routers beside the inventory
    and, if that has an intuition, `own`, the mean intuition of the task's prompts.

    Raises FileError if a router or the sentence encoder cannot be read.
    """
    starts: dict[str, Tensor] = dict(Bundle(inventory).logits())
    if inventory.intuition is not None:
        encoder = SentenceEncoder.of(inventory.intuition.encoder)
        starts["own"] = mean_intuition(inventory.intuition, encoder.embed(prompts))
    return starts


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
    """Fit one router to rows; returns the name of its start, its logits [groups, R] and the losses.

    Routing starts from whichever of `starts` and uniform weights has the lowest loss on the rows.
    `pad` is the token that fills up batches; `progress` is called after every step. With `above`,
    the first `above` decoder layers keep their initial routing, so that their outputs are computed
    only once.

    Raises SpecError if the method has nothing to fit in this mode, or if `above` is given for
    something that acts on all layers.
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
    return name, model.logits[0].detach().cpu().clone(), [record.loss for record in curve]


FIRST_LOOK = 3
"""Rows that all starts are tried on; each round keeps the best quarter and triples the rows."""


@torch.no_grad()
def _choose_start(
    model: MultiTaskModel, examples: Sequence[Example], pad: int, starts: dict[str, Tensor]
) -> str:
    """Put the start with the lowest loss on the rows into the model, and return its name.

    The search is successive halving: a few rows rule out the worst starts, and the last two are
    compared on every row.
    """
    starts = {"uniform": model.logits[0].clone(), **starts}
    names, rows = list(starts), FIRST_LOOK

    def cost(name: str) -> float:
        model.logits[0] = starts[name]
        return torch.stack([model.loss(batch) for batch in batches]).double().sum().item()

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
