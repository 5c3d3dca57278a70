"""`polyrex params`: how many parameters a method has on a base model."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter
from cyclopts.types import PositiveInt

from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.model.attach import ALL_PROJECTIONS
from polyrex.adapters.model.base_model import DEFAULT_BASE
from polyrex.adapters.model.parameter_counts import base_targets, count_parameters, describe
from polyrex.adapters.spec import AdapterSpec

_ADAPTER = Parameter(
    name="*", group=Group("Adapter", help=f"Methods: {', '.join(METHODS)}.", sort_key=1)
)


def params(
    *,
    spec: Annotated[AdapterSpec, _ADAPTER],
    base: Annotated[
        str, Parameter(help="t0-3b, smollm2-135m-instruct, or a folder with a config.json.")
    ] = DEFAULT_BASE,
    targets: Annotated[
        str, Parameter(help="Regular expression on module names; all projections by default.")
    ] = ALL_PROJECTIONS,
    tasks: Annotated[PositiveInt, Parameter(help="Training tasks.")] = 1,
) -> None:
    """Print the parameter counts of a method: multi-task training, and adapting to a new task."""
    print(describe(count_parameters(spec, base_targets(base, targets), tasks)))
