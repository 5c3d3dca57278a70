"""Multi-task training: an inventory and a router for each task, on a frozen base model."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from cyclopts.types import NonNegativeFloat

from polyrex.adapters.files.bundle import NewRouter, write_bundle
from polyrex.adapters.model.attach import ALL_PROJECTIONS, attach, find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, Quantisation, torch_dtype
from polyrex.adapters.model.devices import device_name, pick_device
from polyrex.adapters.model.sentence_encoder import DEFAULT_ENCODER, SentenceEncoder
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import encode_rows
from polyrex.training.data.tasks import Task, example_prompt, load_tasks
from polyrex.training.intuition.cluster import TrainPrompts
from polyrex.training.intuition.embeddings import Embeddings
from polyrex.training.loop.ranks import Ranks
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.checkpointing import checkpoint_layers
from polyrex.training.model.loading import load_for_training
from polyrex.training.model.multi_task import MultiTaskModel

from .records import current_commit, write_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of multi-task training."""

    data: Path
    """Folder with manifest.json and tasks/NAME.jsonl."""
    out: Path
    """Folder for results; an interrupted run resumes there."""
    spec: AdapterSpec
    base: str = DEFAULT_BASE
    """Base model: a name, or its folder."""
    targets: str = ALL_PROJECTIONS
    """Regular expression that the names of the adapted modules match."""
    tasks: tuple[str, ...] | None = None
    """Task to train on; repeat it for more. All tasks of the role if not given."""
    role: str | None = "held_in"
    """Role of the tasks to train on, if none is named."""
    epochs: NonNegativeFloat = 1.0
    """Passes over the train rows of all tasks, if no number of steps is given."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=0))
    encoder: str = DEFAULT_ENCODER
    """Sentence encoder of the intuition: a folder, or a hub's id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type that the model computes in."""
    device: str = "auto"
    """Device to train on: cpu, cuda, cuda:N, or auto, which is CUDA where there is one."""
    quantize: Quantisation | None = None
    """Bits of the frozen layers' weights: 8bit needs torchao, 4bit bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute each layer's activations again for its gradients, instead of keeping them."""
    store_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Data type of the inventory's file."""

    def steps(self, rows: int) -> int:
        """The steps of a run over so many rows: those given, or as many as the epochs take."""
        return self.loop.steps or round(self.epochs * rows / self.loop.batch_rows)


def train(config: TrainConfig) -> Path:
    """Train, and write `inventory.safetensors`, `routers/` and `record.json` to `config.out`.

    Resumes an interrupted run of the same configuration. Under `torchrun`, all processes train
    together and the first one writes. Returns `config.out`.
    """
    device = pick_device(config.device)
    config.out.mkdir(parents=True, exist_ok=True)
    tasks = load_tasks(config.data, config.tasks, config.role)
    base, tokenizer = load_for_training(config.base, config.dtype, device, config.quantize)
    if config.gradient_checkpointing:
        checkpoint_layers(base)
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
    if prompts is not None:  # rows are routed by their own prompts, and tasks by the mean of these
        examples = prompts.route(examples)
        model.logits.data.copy_(prompts.routers())
    loop = replace(config.loop, steps=config.steps(len(examples)))
    logger.info("%d tasks, %d rows, %d steps", len(tasks), len(examples), loop.steps)
    started = time.time()
    curve = run(
        model,
        model.parameter_groups(routing=prompts is None),
        examples,
        loop,
        pad=tokenizer.eos_token_id,
        checkpoint=config.out / "checkpoint.safetensors",
    )
    if not Ranks(device).first:
        return config.out
    write_results(config.out, model, tasks, torch_dtype(config.store_dtype))
    write_record(config.out / "record.json", _record(config, loop, tasks, curve, started))
    return config.out


def _prompts(config: TrainConfig, tasks: Sequence[Task]) -> TrainPrompts:
    """The train prompts, embedded and clustered; embeddings are kept for resumed runs."""
    embeddings = Embeddings(SentenceEncoder(config.encoder), config.out / "embeddings")
    return TrainPrompts.of(embeddings, tasks, config.spec, seed=config.loop.seed)


def write_results(
    out: Path, model: MultiTaskModel, tasks: Sequence[Task], dtype: torch.dtype
) -> None:
    """Write the inventory in `dtype`, with the routers of the tasks beside it."""
    routers = model.routers([task.name for task in tasks])
    new = {
        task.name: NewRouter(
            routers[task.name],
            description=task.instruction,
            provenance={
                "trained": "multi-task",
                "rows": len(task.rows["train"]),
                "commit": current_commit(),
                "example_prompt": example_prompt(task),
            },
        )
        for task in tasks
    }
    write_bundle(out, model.adapted, new, dtype=dtype)


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
            "device": device_name(pick_device(config.device)),
            "quantize": config.quantize,
            "gradient_checkpointing": config.gradient_checkpointing,
        },
        "commit": current_commit(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds_of_last_start": round(time.time() - started),
        "curve": [[r.step, round(r.loss, 4), round(r.tokens_per_second)] for r in curve],
    }
