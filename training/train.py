"""Multi-task training: an inventory and one router a task, on a frozen base model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from polyrex.adapters.files.inventory import write_inventory
from polyrex.adapters.files.router import RouterMetadata, write_router
from polyrex.adapters.model.attach import ALL_PROJECTIONS, attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, load_tokenizer, resolve_base
from polyrex.adapters.model.sentence_encoder import DEFAULT_ENCODER, SentenceEncoder
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import encode_rows
from polyrex.training.data.tasks import Task, load_tasks, prompt_of
from polyrex.training.intuition.cluster import Embeddings, TrainPrompts
from polyrex.training.loop.loop import LoopConfig, StepRecord, current_commit, run, write_record
from polyrex.training.loop.ranks import Ranks
from polyrex.training.model.multi_task import MultiTaskModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what. `epochs` counts passes over the train rows of all tasks."""

    data: Path
    out: Path
    spec: AdapterSpec
    base: str = DEFAULT_BASE
    targets: str = ALL_PROJECTIONS
    tasks: tuple[str, ...] | None = None
    role: str | None = "held_in"
    epochs: float = 1.0
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=0))
    encoder: str = DEFAULT_ENCODER  # of sentences, where the spec has an intuition
    dtype: str = "bfloat16"
    store_dtype: str = "float16"


def train(config: TrainConfig) -> Path:
    """Train, and write `inventory.safetensors`, `routers/` and `record.json` into `config.out`.

    Picks up where an interrupted run of the same configuration stopped. Under `torchrun`, all
    processes train together, and the first one writes. Returns `config.out`.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks(config.data, config.tasks, config.role)
    path = resolve_base(config.base)
    base, tokenizer = load_base(path, getattr(torch, config.dtype)), load_tokenizer(path)
    use_eager_attention(base)
    targets, seed = find_targets(base, config.targets), config.loop.seed
    prompts = _prompts(config, tasks) if config.spec.intuition else None
    intuition = None if prompts is None else prompts.intuition
    adapted = attach(base, config.spec, targets, seed=seed, intuition=intuition)
    model = MultiTaskModel(adapted, len(tasks), seed=seed)
    examples = [
        example
        for index, task in enumerate(tasks)
        for example in encode_rows(tokenizer, task.instruction, task.rows["train"], task=index)
    ]
    groups = model.parameter_groups()
    if prompts is not None:  # every row is routed by its own prompt, and tasks by their mean
        examples, groups["routing"] = prompts.given_to(examples), []
        model.logits.data.copy_(prompts.means())
    steps = config.loop.steps or round(config.epochs * len(examples) / config.loop.batch_rows)
    loop = replace(config.loop, steps=steps)
    logger.info("%d tasks, %d rows, %d steps", len(tasks), len(examples), steps)
    started = time.time()
    curve = run(
        model,
        groups,
        examples,
        loop,
        pad=tokenizer.eos_token_id,
        checkpoint=config.out / "checkpoint.safetensors",
    )
    if not Ranks().first:
        return config.out
    write_results(config.out, model, tasks, getattr(torch, config.store_dtype))
    write_record(config.out / "record.json", _record(config, loop, tasks, curve, started))
    return config.out


def _prompts(config: TrainConfig, tasks: Sequence[Task]) -> TrainPrompts:
    """What the encoder makes of the train rows' prompts; kept, for runs that are resumed."""
    embeddings = Embeddings(SentenceEncoder(config.encoder), config.out / "embeddings")
    return TrainPrompts.of(embeddings, tasks, config.spec, seed=config.loop.seed)


def use_eager_attention(base: nn.Module) -> None:
    """Attention as plain products: on short rows, the CPU's fused kernel has a slow backward."""
    if isinstance(base, PreTrainedModel):
        base.set_attn_implementation("eager")


def example_prompt(task: Task) -> str:
    """A prompt of the task that anyone may try: its first test row, or else its first row."""
    rows = task.rows["test"] or task.rows["train"]
    return prompt_of(task.instruction, rows[0])


def write_results(
    out: Path, model: MultiTaskModel, tasks: Sequence[Task], dtype: torch.dtype
) -> None:
    """Write the inventory in `dtype`, and beside it the routers of the tasks trained together."""
    inventory = out / "inventory.safetensors"
    sha256 = write_inventory(inventory, model.adapted, dtype=dtype)
    routers = model.routers([task.name for task in tasks])
    (out / "routers").mkdir(exist_ok=True)
    for task in tasks:
        metadata = RouterMetadata(
            inventory_sha256=sha256,
            task=task.name,
            description=task.instruction,
            provenance={
                "trained": "multi-task",
                "rows": len(task.rows["train"]),
                "commit": current_commit(),
                "example_prompt": example_prompt(task),
            },
        )
        target = out / "routers" / f"{task.name}.safetensors"
        write_router(target, routers[task.name], model.adapted.spec, metadata)


def _record(
    config: TrainConfig,
    loop: LoopConfig,
    tasks: Sequence[Task],
    curve: list[StepRecord],
    started: float,
) -> dict[str, object]:
    return {
        "config": {
            "base": config.base,
            "targets": config.targets,
            "spec": asdict(config.spec),
            "loop": asdict(loop),
            "tasks": {task.name: len(task.rows["train"]) for task in tasks},
            "dtype": config.dtype,
            "store_dtype": config.store_dtype,
        },
        "commit": current_commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds_of_last_start": round(time.time() - started),
        "curve": [[r.step, round(r.loss, 4), round(r.tokens_per_second)] for r in curve],
    }
