"""The adapters of one layer of an engine, in the form that is added to the layer's output in place.

An engine's layer may hold several target modules side by side (packed projections) and only a part
of each (tensor parallelism). `backends.py` selects what runs a layer. `DeltaLayer`, the methods'
own formula, is the slow twin of every backend, and runs where none fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.adapters.errors import TensorMismatch
from polyrex.adapters.methods.protocol import Experts, Operands
from polyrex.kernels.leaf_states import LeafStates
from polyrex.kernels.modules import Hidden
from polyrex.kernels.routing import StepRouting


@dataclass
class StepContext:
    """The routing of the current forward pass, for the served layers of one model.

    An engine calls `set` before it calls the model; None means the base model alone.
    """

    step: StepRouting | None = None
    states: LeafStates | None = None
    """The states of tasks on the device, where layers read them; LayerBuilder puts them here."""

    def set(self, step: StepRouting | None) -> None:
        """Take the routing of the next forward pass; derive the states that it is first to need.

        All work of the host is done here: a served layer on a GPU only launches kernels.
        """
        if step is not None and self.states is not None:
            self.states.derive(step)
        self.step = step

    @property
    def generation(self) -> int:
        """It increases when buffers that layers read have moved: a CUDA graph is then void."""
        return 0 if self.states is None else self.states.generation


@dataclass(frozen=True)
class Slice:
    """A target module as one layer of an engine sees it.

    `columns` are the module's outputs among the layer's. `inputs` and `outputs` are the parts of
    the module's own dimensions that are here: all, but for the one that tensor parallelism cuts.
    """

    index: int
    experts: Experts
    columns: slice
    inputs: slice
    outputs: slice

    @classmethod
    def whole(cls, index: int, experts: Experts) -> Slice:
        """A module that is a layer by itself."""
        inputs, outputs = slice(0, experts.target.d_in), slice(0, experts.target.d_out)
        return cls(index, experts, outputs, inputs, outputs)

    @property
    def is_whole(self) -> bool:
        """Whether no part of the module is elsewhere."""
        here = self.inputs.stop - self.inputs.start, self.outputs.stop - self.outputs.start
        return here == (self.experts.target.d_in, self.experts.target.d_out)


class ServedLayer(Protocol):
    """The adapters of one layer of an engine."""

    @property
    def state_bytes(self) -> int:
        """Bytes that the layer keeps for one task."""

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""


@runtime_checkable
class TwoPartLayer(ServedLayer, Protocol):
    """Adapters whose A sides can run beside the frozen product, of which only B sides need y.

    `add_(y, x, step)` is `expand_(y, shrink(x, step), step)`.
    """

    def shrink(self, x: Tensor, step: StepRouting) -> Hidden:
        """What the A sides make of x [T, d_in]."""

    def expand_(self, y: Tensor, hidden: Hidden, step: StepRouting) -> None:
        """Add what the B sides make of it to y [T, d], in place."""


class DeltaLayer:
    """Every module's own `delta`, one after the other."""

    state_bytes = 0

    def __init__(self, slices: Sequence[Slice], dtype: torch.dtype) -> None:
        self._slices = [(part, frozen_operands(part.experts, dtype)) for part in slices]

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""
        for part, operands in self._slices:
            # Inputs that are elsewhere are 0 here: the formula is linear, and ranks are summed.
            missing = part.experts.target.d_in - x.shape[1]
            whole = F.pad(x, (part.inputs.start, missing - part.inputs.start)) if missing else x
            delta = part.experts.delta(operands, whole, step.module(part.index))
            y[:, part.columns] += delta[:, part.outputs]


def frozen_operands(experts: Experts, dtype: torch.dtype) -> Operands:
    """The operands of experts that stay as they are, contiguous.

    Raises TensorMismatch where `dtype` cannot hold them.
    """
    with torch.no_grad():
        operands = tuple(t.contiguous() for t in experts.operands(dtype))
    if not all(torch.isfinite(tensor).all() for tensor in operands):
        name = experts.target.name
        raise TensorMismatch(f"target module {name}: the experts are not finite in {dtype}")
    return operands
