"""The commands `polyrex train`, `adapt` and `evaluate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from polyrex.adapters.errors import PolyrexError
from polyrex.adapters.methods.registry import METHODS, method_class
from polyrex.adapters.model.attach import ALL_PROJECTIONS
from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.adapters.model.sentence_encoder import DEFAULT_ENCODER
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.adapt import ADAPTATION, AdaptConfig, AdaptMode
from polyrex.training.adapt import adapt as run_adaptation
from polyrex.training.data.tasks import Split
from polyrex.training.evaluation.report import evaluate_tasks, summary, table
from polyrex.training.loop.loop import LoopConfig
from polyrex.training.loop.optimiser import rates_of
from polyrex.training.train import TrainConfig
from polyrex.training.train import train as run_training

Data = Annotated[Path, typer.Option(help="Folder with manifest.json and tasks/NAME.jsonl.")]
Base = Annotated[str, typer.Option(help="A base model: a name, or its folder.")]
Out = Annotated[Path, typer.Option(help="Folder for results; an interrupted run resumes there.")]
Inventory = Annotated[Path, typer.Option(help="An inventory's file; its routers lie beside it.")]
Tasks = Annotated[list[str] | None, typer.Option(help="A task; repeat it for more. All if none.")]


def _rate(of: str) -> Any:
    return typer.Option(help=f"Learning rate of {of}.", show_default="by method")


def train(
    data: Data,
    out: Out,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "tensorpoly-1",
    base: Base = DEFAULT_BASE,
    task: Tasks = None,
    role: Annotated[str | None, typer.Option(help="Only tasks of this role.")] = "held_in",
    targets: Annotated[str, typer.Option(help="Regular expression on module names.")] = (
        ALL_PROJECTIONS
    ),
    rank: Annotated[int, typer.Option(help="LoRA rank r; for trex I.")] = AdapterSpec.rank,
    rank_out: Annotated[
        int | None, typer.Option(help="For trex J; by default I.", show_default=False)
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Experts E a module.", show_default="8 where there are any")
    ] = None,
    order: Annotated[int, typer.Option(help="Tensor order N.")] = AdapterSpec.order,
    splits: Annotated[int, typer.Option(help="Splits S (mhr).")] = AdapterSpec.splits,
    form: Annotated[str, typer.Option(help="mix, diagonal or static (trex).")] = AdapterSpec.form,
    granularity: Annotated[str, typer.Option(help="module, block or model.")] = (
        AdapterSpec.granularity
    ),
    intuition: Annotated[
        int | None, typer.Option(help="Centroids of T-REX's intuition; the paper has 32.")
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Sentence encoder of the intuition: a folder, or a hub's id.")
    ] = DEFAULT_ENCODER,
    epochs: Annotated[float, typer.Option(help="Passes over the train rows.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps instead of epochs; 0 to count epochs.")] = 0,
    batch_rows: Annotated[int, typer.Option(help="Rows a step.")] = LoopConfig.batch_rows,
    accumulate: Annotated[
        int, typer.Option(help="Parts that a step is computed in, to save memory.", min=1)
    ] = LoopConfig.accumulate,
    expert_rate: Annotated[float | None, _rate("the experts")] = None,
    gate_rate: Annotated[float | None, _rate("scalar gates")] = None,
    routing_rate: Annotated[float | None, _rate("routing logits")] = None,
    sample_routing: Annotated[
        bool, typer.Option(help="Draw routing weights from a relaxed Bernoulli while training.")
    ] = LoopConfig.sample_routing,
    seed: Annotated[int, typer.Option(help="Of initial values, row order and routing noise.")] = 0,
) -> None:
    """Train an inventory and one router a task, on a frozen base model."""
    with clear_errors():
        fields: dict[str, Any] = {  # AdapterSpec checks them
            "rank_out": rank_out,
            "form": form,
            "granularity": granularity,
            "intuition": intuition,
        }
        if experts is None:
            experts = 8 if "experts" in method_class(method).uses else AdapterSpec.experts
        spec = AdapterSpec(method, rank, experts, order, splits, **fields)
        rates = rates_of(method)
        given = {"experts": expert_rate, "gates": gate_rate, "routing": routing_rate}
        loop = LoopConfig(
            steps=steps,
            batch_rows=batch_rows,
            rates=replace(rates, **{name: r for name, r in given.items() if r is not None}),
            sample_routing=sample_routing,
            seed=seed,
            accumulate=accumulate,
        )
        config = TrainConfig(
            data=data,
            out=out,
            spec=spec,
            base=base,
            targets=targets,
            tasks=tuple(task) if task else None,
            role=None if task else role,
            epochs=epochs,
            loop=loop,
            encoder=encoder,
        )
        typer.echo(f"wrote {run_training(config)}")


def adapt(
    data: Data,
    task: Annotated[str, typer.Option(help="The new task.")],
    inventory: Inventory,
    out: Out,
    mode: Annotated[AdaptMode, typer.Option(help="What is trained.")] = "routing",
    rows: Annotated[int, typer.Option(help="Train rows used.", min=1)] = AdaptConfig.rows,
    base: Base = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = ADAPTATION.steps,
    routing_rate: Annotated[float, typer.Option(help="Learning rate of routing logits.")] = (
        ADAPTATION.rates.routing
    ),
    seed: Annotated[int, typer.Option(help="Of the rows' draw and their order.")] = 0,
) -> None:
    """Adapt a new task from a few rows; by default its routing only, the inventory left alone."""
    with clear_errors():
        rates = replace(ADAPTATION.rates, routing=routing_rate)
        loop = replace(ADAPTATION, steps=steps, rates=rates, seed=seed)
        config = AdaptConfig(data, task, inventory, out, mode, rows, base, loop)
        typer.echo(f"wrote {run_adaptation(config)}")


def evaluate(
    data: Data,
    inventory: Inventory,
    out: Annotated[Path, typer.Option(help="JSON file for the scores.")],
    task: Tasks = None,
    split: Annotated[Split, typer.Option(help="Which rows.")] = "test",
    base: Base = DEFAULT_BASE,
) -> None:
    """Score tasks by the base model alone and under the routers that lie beside an inventory."""
    with clear_errors():
        reports = evaluate_tasks(data, inventory, out, base=base, tasks=task, split=split)
    typer.echo(table(reports))
    typer.echo(json.dumps(summary(reports)))


@contextmanager
def clear_errors() -> Iterator[None]:
    """What polyrex raises on purpose is a message for the user, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        yield
    except PolyrexError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
