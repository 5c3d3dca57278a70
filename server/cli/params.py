"""`polyrex params`: how many parameters a method has on a base model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.model.attach import ALL_PROJECTIONS
from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.adapters.model.parameter_counts import base_targets, count_parameters, describe
from polyrex.adapters.spec import AdapterSpec


def params(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")],
    base: Annotated[
        str, typer.Option(help="t0-3b, smollm2-135m-instruct, or a folder with a config.json.")
    ] = DEFAULT_BASE,
    rank: Annotated[int, typer.Option(help="LoRA rank r; for trex the experts I on the input.")] = (
        AdapterSpec.rank
    ),
    experts: Annotated[int, typer.Option(help="Experts E a module.")] = AdapterSpec.experts,
    order: Annotated[int, typer.Option(help="Tensor order N.")] = AdapterSpec.order,
    splits: Annotated[int, typer.Option(help="Splits S (mhr).")] = AdapterSpec.splits,
    rank_out: Annotated[
        int | None, typer.Option(help="Experts J on the output (trex); I by default.")
    ] = None,
    form: Annotated[str, typer.Option(help="mix, diagonal or static (trex).")] = AdapterSpec.form,
    granularity: Annotated[
        str, typer.Option(help="Modules that share routing logits: module, block or model.")
    ] = AdapterSpec.granularity,
    intuition: Annotated[
        int | None, typer.Option(help="Centroids of T-REX's intuition; none without.")
    ] = AdapterSpec.intuition,
    targets: Annotated[
        str, typer.Option(help="Regular expression on module names.", show_default="projections")
    ] = ALL_PROJECTIONS,
    tasks: Annotated[int, typer.Option(min=1, help="Training tasks.")] = 1,
) -> None:
    """Print the parameter counts of a method: multi-task training, and adapting to a new task."""
    choices: dict[str, Any] = {"form": form, "granularity": granularity}  # AdapterSpec checks them
    spec = AdapterSpec(
        method,
        rank=rank,
        experts=experts,
        order=order,
        splits=splits,
        rank_out=rank_out,
        intuition=intuition,
        **choices,
    )
    typer.echo(describe(count_parameters(spec, base_targets(base, targets), tasks)))
