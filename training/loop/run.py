"""The training loop, shared by all methods, by multi-task training and by adaptation."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save

from polyrex.adapters.errors import DataError
from polyrex.adapters.files.tensor_file import write_atomic
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.training.data.batches import Example, batch_indices
from polyrex.training.model.multi_task import Groups, MultiTaskModel

from .optimiser import Optimiser, schedule
from .ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how fast."""

    steps: NonNegativeInt
    """Steps of the optimiser; for multi-task training, 0 counts epochs instead."""
    batch_rows: PositiveInt = 16
    """Rows of a step."""
    rates: LearningRates = field(default_factory=LearningRates)
    warmup: NonNegativeInt = 20
    """Steps over which the learning rates rise to their peaks."""
    sample_routing: bool = True
    """Draw routing weights from a relaxed Bernoulli distribution during training, as the papers do.
    """
    seed: int = 0
    """Seed of the initial values, the choice and order of rows, and the routing noise."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints."""
    accumulate: PositiveInt = 1
    """Parts that a step's rows are split into, to save memory; only the routing noise differs."""


@dataclass(frozen=True)
class StepRecord:
    """One point of a run's curve."""

    step: int
    loss: float
    tokens_per_second: float


def steps_of(
    examples: Sequence[Example], config: LoopConfig, start: int
) -> Iterator[list[Example]]:
    """Yield the rows of each step, from step `start` on, epoch after epoch without end."""
    lengths = [len(example) for example in examples]
    per_epoch = -(-len(examples) // config.batch_rows)
    epoch, skip = divmod(start, per_epoch)
    while True:
        plan = batch_indices(lengths, config.batch_rows, seed=config.seed, epoch=epoch)
        for indices in plan[skip:]:
            yield [examples[i] for i in indices]
        epoch, skip = epoch + 1, 0


def run(
    model: MultiTaskModel,
    groups: Groups,
    examples: Sequence[Example],
    config: LoopConfig,
    *,
    pad: int,
    checkpoint: Path | None = None,
    title: str = "training",
    progress: Callable[[StepRecord], None] | None = None,
) -> list[StepRecord]:
    """Train the parameters in `groups` for `config.steps` steps and return the curve.

    With `checkpoint`, resume from that file if it exists, and keep it up to date. A resumed run
    follows the same curve as an uninterrupted one: rows and routing noise depend only on the seed
    and the step. `progress` is called after every step; without it, a progress bar is shown.

    Raises DataError if there are no rows, or if the checkpoint is of another configuration.
    """
    if not examples:
        raise DataError(f"{title}: no rows to train on")
    for members in groups.values():
        for _, parameter in members:
            parameter.requires_grad_(True)
    optimiser = Optimiser(groups, config.rates)
    curve: list[StepRecord] = []
    if checkpoint is not None and checkpoint.exists():
        curve = _load_checkpoint(checkpoint, optimiser, config)
    steps = steps_of(examples, config, len(curve))
    ranks = Ranks(model.logits.device)
    with _bar(
        title, config.steps, len(curve), disable=progress is not None or not ranks.first
    ) as bar:
        for step in range(len(curve), config.steps):
            curve.append(_train_step(model, optimiser, next(steps), config, pad, ranks, step))
            recent = [r.loss for r in curve[-20:]]
            speed = curve[-1].tokens_per_second
            note = f"loss {sum(recent) / len(recent):.3f}  {speed:.0f} tokens/s"
            bar.update(bar.task_ids[0], advance=1, note=note)
            if progress is not None:
                progress(curve[-1])
            if (step + 1) % 20 == 0:
                logger.info("%s: step %d/%d %s", title, step + 1, config.steps, note)
            due = (step + 1) % config.checkpoint_every == 0
            if checkpoint is not None and due and ranks.first:
                _save_checkpoint(checkpoint, optimiser, config, curve)
    if checkpoint is not None and ranks.first:
        _save_checkpoint(checkpoint, optimiser, config, curve)
    return curve


def _train_step(
    model: MultiTaskModel,
    optimiser: Optimiser,
    examples: Sequence[Example],
    config: LoopConfig,
    pad: int,
    ranks: Ranks,
    step: int,
) -> StepRecord:
    started = time.perf_counter()
    torch.manual_seed(config.seed * 1_000_003 + step)  # the routing noise of this step
    total = torch.zeros((), device=model.logits.device)
    for part in ranks.own_parts(examples, config.accumulate):
        batch = model.collate(part, pad, rows=len(examples))
        loss = model.loss(batch, sample=config.sample_routing)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    total = ranks.add_up(total, optimiser.parameters)
    optimiser.step(schedule(step, config.steps, config.warmup))
    value = total.item()  # the one place in a step where the host waits for the device
    seconds = time.perf_counter() - started
    return StepRecord(step, value, sum(map(len, examples)) / seconds)


def _bar(title: str, steps: int, done: int, *, disable: bool) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        disable=disable,
    )
    bar.add_task(title, total=steps, completed=done, note="")
    return bar


def _save_checkpoint(
    path: Path, optimiser: Optimiser, config: LoopConfig, curve: list[StepRecord]
) -> None:
    metadata = {
        "config": json.dumps(asdict(config), sort_keys=True),
        "curve": json.dumps([asdict(record) for record in curve]),
    }
    write_atomic(path, save(optimiser.state(), metadata))


def _load_checkpoint(path: Path, optimiser: Optimiser, config: LoopConfig) -> list[StepRecord]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        found, expected = json.loads(metadata["config"]), asdict(config)
        if found != expected:
            raise DataError(
                f"{path}: a checkpoint of another configuration ({found}); this run has "
                f"{expected}. Use another run folder, or delete it to start again"
            )
        optimiser.load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    curve = [StepRecord(**record) for record in json.loads(metadata["curve"])]
    logger.info("resuming %s at step %d", path, len(curve))
    return curve
