"""Selects the backend of an engine's layers from one table: (space, device) -> builder.

`choose` takes the first row of the table whose condition holds. Where none does, PyTorch's own
operators run the method's formula, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from polyrex.adapters.methods.protocol import Space
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.cpu.build import why_not_compiled
from polyrex.kernels.cpu.rank_space import PairSpaceLayer, RankSpaceLayer
from polyrex.kernels.cpu.task_state import TaskStateLayer
from polyrex.kernels.cpu.token_gates import TokenSpaceLayer
from polyrex.kernels.factored import RANK, FactoredSides
from polyrex.kernels.leaf_states import LeafStates
from polyrex.kernels.modules import LayerModule, LeafModule, TaskState, TaskStateModule

from .layers import DeltaLayer, ServedLayer, Slice, frozen_operands

Slices = Sequence[Slice]
Build = Callable[[Slices, torch.dtype, LeafStates], ServedLayer]
WhyNot = Callable[[Slices, torch.dtype], str | None]


@dataclass(frozen=True)
class Backend:
    """One row of the table. All slices of a layer are of one method."""

    name: str
    space: Space | None
    """The space of the methods that it runs; None for any."""
    device: str | None
    """The type of device that it runs on; None for any."""
    build: Build
    why_not: WhyNot
    """The reason why these slices cannot run so in this dtype, or None where they can."""


@dataclass(frozen=True)
class Choice:
    """The backend of a layer, and why it is this one."""

    backend: Backend
    reason: str


def choose(slices: Slices, dtype: torch.dtype, device: torch.device) -> Choice:
    """The first backend of the table that can run these slices, or else PyTorch's operators."""
    experts = slices[0].experts
    rejected = []
    for backend in BACKENDS:
        if (backend.space, backend.device) == (experts.space, device.type):
            reason = backend.why_not(slices, dtype)
            if reason is None:
                return Choice(backend, f"{experts.space} space on {device.type}")
            rejected.append(reason)
    none = f"there is no kernel for {experts.method} on {device.type}"
    return Choice(PYTORCH, "; ".join(rejected) or none)


def explain(spec: AdapterSpec, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The backend of a method on a device, and why, for a whole target module."""
    experts = make_experts(spec, TargetModule("example", 60, 60))
    choice = choose([Slice.whole(0, experts)], dtype, device)
    return choice.backend.name, choice.reason


def _never(_slices: Slices, _dtype: torch.dtype) -> str | None:
    return None


def _cpu_dtype(_slices: Slices, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"the compiled operators take float32 and bfloat16, not {dtype}"
    return why_not_compiled()


def _cpu_whole(slices: Slices, dtype: torch.dtype) -> str | None:
    if not all(part.is_whole for part in slices):
        return "the compiled operator takes whole modules"
    return _cpu_dtype(slices, dtype)


def _cpu_leaves(slices: Slices, dtype: torch.dtype) -> str | None:
    rank = slices[0].experts.spec.rank
    if rank > RANK:
        return f"the compiled operator takes ranks up to {RANK}, not {rank}"
    return _cpu_whole(slices, dtype)


def _triton(_slices: Slices, _dtype: torch.dtype) -> str | None:
    return None if find_spec("triton") else "triton is not installed"


def _triton_unsplit(slices: Slices, dtype: torch.dtype) -> str | None:
    experts = slices[0].experts
    if experts.table_size(experts.spec) > experts.spec.experts:
        return f"{experts.method} has no layer on the Triton kernels"
    return _triton(slices, dtype)


def _modules(slices: Slices, dtype: torch.dtype) -> list[LayerModule]:
    return [
        LayerModule(
            part.index,
            *part.experts.sides(frozen_operands(part.experts, dtype)),
            part.inputs,
            part.outputs,
            part.columns.start,
        )
        for part in slices
    ]


def _cpu_rank(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    experts = slices[0].experts
    width = experts.table_size(experts.spec)
    return RankSpaceLayer(_modules(slices, dtype), experts.spec.experts, width)


def _cpu_pair(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    return PairSpaceLayer(_modules(slices, dtype))


def _cpu_token(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    experts = slices[0].experts
    gates = [p.experts.token_gates(frozen_operands(p.experts, dtype)) for p in slices]
    return TokenSpaceLayer(_modules(slices, dtype), gates, experts.table_size(experts.spec))


def _state_module(part: Slice) -> TaskStateModule[TaskState]:
    experts = part.experts
    derive = partial(experts.task_state, frozen_operands(experts, torch.float32))
    width = experts.table_size(experts.spec)
    return TaskStateModule(part.index, width, experts.target.d_out, part.columns.start, derive)


def _cpu_state(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    return TaskStateLayer([_state_module(part) for part in slices], dtype)


def _triton_rank(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    from polyrex.kernels.gpu.layers import TritonRankSpaceLayer  # imports triton

    return TritonRankSpaceLayer(_modules(slices, dtype))


def _triton_pair(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    from polyrex.kernels.gpu.layers import TritonPairSpaceLayer

    return TritonPairSpaceLayer(_modules(slices, dtype))


def _triton_leaf(slices: Slices, _dtype: torch.dtype, states: LeafStates) -> ServedLayer:
    from polyrex.kernels.gpu.layers import TritonLeafLayer

    return TritonLeafLayer([_leaf_module(part) for part in slices], states)


def _leaf_module(part: Slice) -> LeafModule:
    experts = part.experts

    def derive(operands: tuple[Tensor, ...], weights: Tensor) -> FactoredSides:
        state = experts.task_state(operands, weights)
        assert isinstance(state, FactoredSides), "leaf space: the state of a task is its leaves"
        return state

    return LeafModule(
        part.index,
        experts.table_size(experts.spec),
        (experts.spec, experts.target.d_in, experts.target.d_out),
        frozen_operands(experts, torch.float32),
        derive,
        part.inputs,
        part.outputs,
        part.columns.start,
    )


def _pytorch(slices: Slices, dtype: torch.dtype, _states: LeafStates) -> ServedLayer:
    return DeltaLayer(slices, dtype)


PYTORCH = Backend("pytorch", None, None, _pytorch, _never)
"""The methods' own formula, in PyTorch's operators."""

BACKENDS = (
    Backend("compiled rank space", "rank", "cpu", _cpu_rank, _cpu_dtype),
    Backend("compiled pair space", "pair", "cpu", _cpu_pair, _cpu_dtype),
    Backend("compiled token gates", "token", "cpu", _cpu_token, _cpu_dtype),
    Backend("compiled factored", "leaf", "cpu", _cpu_state, _cpu_leaves),
    Backend("compiled kronecker", "bond", "cpu", _cpu_state, _cpu_whole),
    Backend("triton rank space", "rank", "cuda", _triton_rank, _triton_unsplit),
    Backend("triton pair space", "pair", "cuda", _triton_pair, _triton),
    Backend("triton factored", "leaf", "cuda", _triton_leaf, _triton),
)
"""Of the rows for a space and a device, the first whose condition holds is taken."""
