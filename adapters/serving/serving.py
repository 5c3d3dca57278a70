"""Adapters as engines run them: frozen, prepared once, added to a layer's output in place.

An engine's layer may hold several target modules side by side (packed projections) and only a part
of each (tensor parallelism). Where a compiled operator has the method's formula it is used; the
method's own `delta` is the twin, and what runs otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.adapters.errors import TensorMismatch
from polyrex.adapters.methods.protocol import Experts, Operands
from polyrex.adapters.methods.tensor_product import FactoredSide
from polyrex.adapters.methods.tensorpoly_1 import TensorPoly1Experts
from polyrex.adapters.methods.tensorpoly_2 import TensorPoly2Experts
from polyrex.adapters.methods.tensorpoly_x import TensorPolyXExperts
from polyrex.kernels.cpu.build import why_not_compiled
from polyrex.kernels.cpu.rank_space import LayerModule, PairSpaceLayer, RankSpaceLayer
from polyrex.kernels.cpu.task_state import OwnStateLayer, OwnStateModule, State
from polyrex.kernels.cpu.token_gates import TokenSpaceLayer
from polyrex.kernels.factored import RANK, FactoredSides
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import Kept, OwnStates, Planner, SharedOnly, SharedOrComposed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """A target module as one layer of an engine sees it.

    `columns` are its outputs among the layer's; `inputs` and `outputs` are what is here of the
    module's own: all of them, but for the dimension that tensor parallelism cuts.
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
        """Whether nothing of the module is elsewhere."""
        here = self.inputs.stop - self.inputs.start, self.outputs.stop - self.outputs.start
        return here == (self.experts.target.d_in, self.experts.target.d_out)


class ServedLayer(Protocol):
    """The adapters of one layer of an engine."""

    @property
    def state_bytes(self) -> int:
        """What the layer keeps for one task, in bytes."""

    def add_(self, y: Tensor, x: Tensor, step: StepRouting) -> None:
        """Add the adapters' part for x [T, d_in] to y [T, d], in place."""


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


def serve_layer(slices: Sequence[Slice], dtype: torch.dtype, device: torch.device) -> ServedLayer:
    """Freeze the experts of one layer's modules, all of one method, for products in `dtype`.

    Raises TensorMismatch where `dtype` cannot hold them.
    """
    space, (path, _) = slices[0].experts.space, choose_path(slices, dtype, device)
    if path == "delta":
        return DeltaLayer(slices, dtype)
    if path == "triton":
        return _triton_layer(slices, dtype)
    if space in ("leaf", "bond"):
        return OwnStateLayer([_own_state(part) for part in slices], dtype)
    operands = [frozen_operands(part.experts, dtype) for part in slices]
    modules = [_module(*each) for each in zip(slices, operands, strict=True)]
    if space == "pair":
        return PairSpaceLayer(modules)
    experts = slices[0].experts
    width = experts.table_size(experts.spec)
    if space == "token":
        pairs = zip(slices, operands, strict=True)
        return TokenSpaceLayer(modules, [p.experts.token_gates(own) for p, own in pairs], width)
    return RankSpaceLayer(modules, experts.spec.experts, width)


def _triton_layer(slices: Sequence[Slice], dtype: torch.dtype) -> ServedLayer:
    from polyrex.kernels.gpu import layers as triton_layers  # where there is Triton

    experts = slices[0].experts
    if experts.space == "leaf":
        return triton_layers.TritonLeafLayer([_leaf_module(part) for part in slices])
    if _in_leaves(slices):
        return triton_layers.TritonFactoredLayer(
            [
                triton_layers.FactoredModule(part.index, part.columns, _expert_leaves(part.experts))
                for part in slices
            ]
        )
    modules = [_module(part, frozen_operands(part.experts, dtype)) for part in slices]
    if experts.space == "pair":
        return triton_layers.TritonPairSpaceLayer(modules)
    return triton_layers.TritonRankSpaceLayer(modules)


Path = Literal["compiled", "triton", "delta"]


def choose_path(
    slices: Sequence[Slice], dtype: torch.dtype, device: torch.device
) -> tuple[Path, str]:
    """What a layer's adapters run on, and why: operators compiled for the CPU, Triton, or PyTorch.

    All slices are of one method.
    """
    experts = slices[0].experts
    spec, space = experts.spec, experts.space
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "delta", "triton is not installed"
        if space in ("bond", "token") or (
            experts.table_size(spec) > spec.experts and space == "rank"
        ):
            return "delta", f"{spec.method} has no layer on the Triton kernels"
        if _in_leaves(slices):
            return "triton", "leaves on the GPU"
        if space == "leaf":
            return "delta", "the Triton kernels take whole modules of leaves"
        return "triton", f"{space} space on the GPU"
    if device.type != "cpu":
        return "delta", f"there are kernels for CPU and CUDA, not for {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return "delta", f"the compiled operators take float32 and bfloat16, not {dtype}"
    if space == "leaf" and spec.rank > RANK:
        return "delta", f"the compiled operator takes ranks up to {RANK}, not {spec.rank}"
    if space in ("leaf", "bond") and not all(part.is_whole for part in slices):
        return "delta", "the compiled operator takes whole modules"
    if reason := why_not_compiled():
        return "delta", reason
    return "compiled", f"{space} space on the CPU"


def make_planner(layers: Sequence[ServedLayer], experts: Experts, state_bytes: int) -> Planner:
    """What decides how steps run over these layers; says once what it may choose from.

    `state_bytes` is what layers may take for what they make of single tasks.
    """
    state = sum(layer.state_bytes for layer in layers)
    if not state:
        return SharedOnly()
    kept = Kept(state_bytes // state)
    logger.info(
        "%s: up to %d tasks kept ready, %.1f MB each", experts.method, kept.capacity, state / 1e6
    )
    if experts.space in ("leaf", "bond"):
        return OwnStates(kept)
    return SharedOrComposed(kept, experts.spec.experts)


def frozen_operands(experts: Experts, dtype: torch.dtype) -> Operands:
    """What the products read. Raises TensorMismatch where `dtype` cannot hold it."""
    with torch.no_grad():
        operands = tuple(t.contiguous() for t in experts.operands(dtype))
    _check_finite(operands, experts, dtype)
    return operands


def _check_finite(tensors: Iterable[Tensor], experts: Experts, dtype: torch.dtype) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        name = experts.target.name
        raise TensorMismatch(f"target module {name}: the experts are not finite in {dtype}")


def _module(part: Slice, operands: Operands) -> LayerModule:
    a, b, *_ = operands
    if part.experts.space != "rank":
        a, b = a.unsqueeze(0), b.t().unsqueeze(0)
    return LayerModule(part.index, a, b, part.inputs, part.outputs, part.columns.start)


def _in_leaves(slices: Sequence[Slice]) -> bool:
    """Whether these are whole modules whose sides are tensor products."""
    return all(part.is_whole and isinstance(part.experts, TensorPoly1Experts) for part in slices)


def _own_state(part: Slice) -> OwnStateModule[State]:
    experts = part.experts
    if not isinstance(experts, TensorPolyXExperts):
        return _leaf_module(part)
    derive = partial(experts.factors, frozen_operands(experts, torch.float32))
    return _state_module(part, derive)


def _leaf_module(part: Slice) -> OwnStateModule[FactoredSides]:
    experts = part.experts
    assert isinstance(experts, TensorPoly2Experts)
    operands = frozen_operands(experts, torch.float32)

    def derive(weights: Tensor) -> FactoredSides:
        return _scaled(*experts.sides(operands, weights), operands[1])

    return _state_module(part, derive)


S = TypeVar("S", bound=State)


def _state_module(part: Slice, derive: Callable[[Tensor], S]) -> OwnStateModule[S]:
    experts = part.experts
    width = experts.table_size(experts.spec)
    return OwnStateModule(part.index, width, experts.target.d_out, part.columns.start, derive)


def _expert_leaves(experts: Experts) -> FactoredSides:
    """The sides of every expert of a module. Raises TensorMismatch where one is not finite."""
    assert isinstance(experts, TensorPoly1Experts)
    scale = (experts.gate.detach() / experts.spec.rank).float()
    sides = _scaled(*experts.leaf_sides(), scale)
    leaves = sides.a_first, sides.a_second, sides.b_first, sides.b_second
    _check_finite(leaves, experts, torch.float32)
    return sides


def _scaled(a: FactoredSide, b: FactoredSide, scale: Tensor) -> FactoredSides:
    a_first, a_second, b_first, b_second = (
        leaves.contiguous() for leaves in (a.first, a.second, b.first * scale, b.second)
    )
    shift = None if b.shift is None else b.shift * scale
    return FactoredSides(a_first, a_second, a.shift, b_first, b_second, shift)
