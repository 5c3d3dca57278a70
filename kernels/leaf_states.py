"""The states of tasks on a GPU, for methods that mix leaves: derived when a step is first to need
them, for all modules of one kind at once, and kept by place.

A state is both sides of a task's adapter in every module. A side is its shift, then
first [r, p] and second [r, p'], flattened, in the dtype of the products; each of the three is
padded to a multiple of 16 numbers, so that kernels can read 16 bytes at a time. The shift is kept
as the sum of two numbers, for more precision than 16 bits have.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .factored import FactoredSides
from .modules import LeafModule
from .routing import StepRouting
from .step_plan import StepPlan

ALIGNED = 16
"""Numbers to a multiple of which every part of a state is padded."""
TOGETHER = 32
"""Tasks that are derived at a time: more would take more memory for what is in between."""


class StateSide(NamedTuple):
    """Where one side of a module's state is, and its sizes."""

    offset: int  # in a task's row of `LeafStates.values`
    rank: int
    first: int  # p
    second: int  # p'

    @property
    def size(self) -> int:
        """The numbers of the side, with its shift and its padding."""
        return ALIGNED + _padded(self.rank * self.first) + _padded(self.rank * self.second)


@dataclass
class _Kind:
    """The modules whose states are derived together."""

    modules: list[LeafModule]
    a: StateSide  # offsets within a module's state
    b: StateSide
    begin: int = 0  # where their states begin in a row of values
    indices: Tensor | None = None  # of the modules, [Ms] int64
    operands: tuple[Tensor, ...] = ()  # of all modules, [Ms, ...]

    @property
    def size(self) -> int:
        """The numbers of one module's state."""
        return self.a.size + self.b.size


class LeafStates:
    """The states of one model's tasks, `values` [places, size]: a task's state is a row of it."""

    def __init__(self, dtype: torch.dtype, generation: int = 0) -> None:
        """`generation` is where to count from: above that of states whose place these take."""
        self.generation = generation
        """It increases when `values` has moved."""
        self._dtype = dtype
        self._kinds: dict[Hashable, _Kind] = {}
        self._reserved = 0
        self._values: Tensor | None = None
        self._keys: dict[int, object] = {}  # of the place when its state was derived
        self._ready: StepPlan | None = None

    @property
    def values(self) -> Tensor:
        """[places, size] in the dtype of the products."""
        assert self._values is not None, "no step has named a task's state"
        return self._values

    def add(self, module: LeafModule) -> int:
        """Keep the states of one more module. Returns the bytes that one task takes for it."""
        assert self._values is None, "all modules are there before the first step"
        if module.kind not in self._kinds:
            weights = torch.zeros(1, module.width, device=module.operands[0].device)
            empty = module.derive(module.operands, weights)
            rank, first, second = *empty.a_first.shape[1:], empty.a_second.shape[2]
            a = StateSide(0, rank, first, second)
            b = StateSide(a.size, rank, empty.b_first.shape[2], empty.b_second.shape[2])
            self._kinds[module.kind] = _Kind([], a, b)
        kind = self._kinds[module.kind]
        kind.modules.append(module)
        return kind.size * self._dtype.itemsize

    def reserve(self, places: int) -> None:
        """Make room for so many tasks at the first step, so that `values` need not move later."""
        self._reserved = places

    def sides(self, module: LeafModule) -> tuple[StateSide, StateSide]:
        """Where the A side and the B side of a module are, once there are values."""
        kind = self._kinds[module.kind]
        begin = kind.begin + kind.modules.index(module) * kind.size
        return kind.a._replace(offset=begin), kind.b._replace(offset=begin + kind.b.offset)

    def derive(self, step: StepRouting) -> None:
        """Derive the states that the step is first to need."""
        if not self._kinds or step.plan is self._ready:
            return
        # Without states every token would silently get the base model's answer.
        assert step.plan.places, "the plan names no task's state"
        self._make_room(1 + max(place.number for _, place in step.plan.places))
        fresh = [
            (row, place.number)
            for row, place in step.plan.places
            if self._keys.get(place.number) is not place.key
        ]
        for begin in range(0, len(fresh), TOGETHER):
            rows, numbers = zip(*fresh[begin : begin + TOGETHER], strict=True)
            device = step.weights.device
            weights = step.weights.index_select(0, _on(device, rows)).float()
            self._derive(weights, _on(device, numbers))
        self._keys.update((place.number, place.key) for _, place in step.plan.places)
        self._ready = step.plan

    @torch.no_grad()
    def _derive(self, weights: Tensor, places: Tensor) -> None:
        """Fill D places from the routing weights [D, M, W] of their tasks."""
        for kind in self._kinds.values():
            derive = kind.modules[0].derive

            def packed(operands: tuple[Tensor, ...], own: Tensor) -> Tensor:
                return _packed(derive(operands, own), self._dtype)  # noqa: B023

            assert kind.indices is not None, "the layout is made with the values"
            own = weights.index_select(1, kind.indices)  # [D, Ms, W]
            states = torch.vmap(packed, in_dims=(0, 1), out_dims=1)(kind.operands, own)
            columns = slice(kind.begin, kind.begin + kind.size * len(kind.modules))
            self.values[:, columns].index_copy_(0, places, states.flatten(1))

    def _make_room(self, places: int) -> None:
        """Have at least `places` places: those that were reserved, or half as many again."""
        before = 0
        if self._values is None:
            self._lay_out()
        else:
            before = len(self._values)
        if places > before:
            size = max(places, self._reserved, before + before // 2)
            columns = sum(kind.size * len(kind.modules) for kind in self._kinds.values())
            device = next(iter(self._kinds.values())).operands[0].device
            with torch.inference_mode(False):  # so that any later step may write to it
                larger = torch.zeros(size, columns, dtype=self._dtype, device=device)
            if self._values is not None:
                larger[:before] = self._values
            self._values = larger
            self.generation += 1

    def _lay_out(self) -> None:
        """Put the states of each kind's modules side by side, and their operands together."""
        begin = 0
        for kind in self._kinds.values():
            kind.begin = begin
            begin += kind.size * len(kind.modules)
            by_operand = zip(*(module.operands for module in kind.modules), strict=True)
            kind.operands = tuple(torch.stack(each) for each in by_operand)
            indices = [module.index for module in kind.modules]
            kind.indices = _on(kind.operands[0].device, indices)


def _packed(sides: FactoredSides, dtype: torch.dtype) -> Tensor:
    """[D, size]: each task's sides of one module, as the head of this file lays them out."""

    def aligned(values: Tensor) -> Tensor:
        flat = values.flatten(1).to(dtype)
        return F.pad(flat, (0, -flat.shape[1] % ALIGNED))

    parts = []
    for first, second, shift in (
        (sides.a_first, sides.a_second, sides.a_shift),
        (sides.b_first, sides.b_second, sides.b_shift),
    ):
        exact = first[:, :1, 0] * 0 if shift is None else shift  # [D, 1]
        high = exact.to(dtype)
        parts += [aligned(torch.cat((high, (exact - high.float()).to(dtype)), 1))]
        parts += [aligned(first), aligned(second)]
    return torch.cat(parts, 1)


def _padded(size: int) -> int:
    return size + -size % ALIGNED


def _on(device: torch.device, numbers: Sequence[int]) -> Tensor:
    """[n] int64 on the device; the host does not wait for the copy."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
