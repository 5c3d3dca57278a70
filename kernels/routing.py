"""Routing weights as layers read them: the table of slots, and the rows that one step reads.

A row of zeros means no adapter: every method's delta is exactly 0 for it. Slot 0 is such a row.

On the CPU a step gathers the rows that occur, once for all layers. On a GPU nothing is gathered:
kernels read the table itself, by the slot of each token, at addresses that never change, as a CUDA
graph needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .step_plan import SHARED, Planner, SharedOnly, StepPlan, log_change


def reads_by_slot(device: torch.device) -> bool:
    """Whether steps on the device read the table itself, from buffers that stay where they are."""
    return device.type == "cuda"


@dataclass(frozen=True)
class StepRouting:
    """The routing of one forward pass, for all M modules.

    It has T tokens and D rows, each of W weights a module: the distinct rows of the step, or all of
    the table, whose values may change under a step that is kept (in a CUDA graph).
    """

    weights: Tensor  # [D, M, W]; float32 if gathered, in the table's dtype if by slot
    rows: Tensor  # [T] int64, the row of each token among the D
    dtype: torch.dtype  # of the products
    plan: StepPlan = SHARED
    by_slot: bool = False
    """Whether `weights` is the table itself: then nothing that depends on it is kept here."""
    slot_places: Tensor | None = None
    """[T] int64, by slot only: see `places`."""
    _spread: dict[int, StepRouting] = field(default_factory=dict, repr=False, compare=False)

    def spread(self, tokens: int) -> StepRouting:
        """The same routing for `tokens` tokens: each row is repeated for an equal run of them.

        For padded batches, in which each sequence belongs to one task.
        """
        if tokens == len(self.rows):
            return self
        if tokens not in self._spread:
            rows = self.rows.repeat_interleave(tokens // len(self.rows))
            self._spread[tokens] = StepRouting(self.weights, rows, self.dtype)
        return self._spread[tokens]

    # One unbind for all modules: the gradient of indexing one would be a tensor of the size of all.
    @cached_property
    def row_weights(self) -> tuple[Tensor, ...]:
        """M times [D, W] in the dtype of `weights`."""
        return self.weights.unbind(1)

    @cached_property
    def token_weights(self) -> tuple[Tensor, ...]:
        """M times [T, W] in the compute dtype."""
        return self.by_token.unbind(1)

    @cached_property
    def by_token(self) -> Tensor:
        """[T, M, W] in the compute dtype."""
        return self.weights.to(self.dtype).index_select(0, self.rows)

    @cached_property
    def places(self) -> Tensor:
        """[T] int64: the place of the state of each token's task; -1 for the base model."""
        if self.slot_places is not None:
            return self.slot_places
        by_row = torch.full((len(self.weights),), -1, device=self.rows.device)
        for row, place in self.plan.places:
            by_row[row] = place.number
        return by_row[self.rows]

    def module(self, index: int) -> ModuleRouting:
        """The routing of target module number `index`."""
        return ModuleRouting(self, index)


@dataclass(frozen=True)
class ModuleRouting:
    """The routing of one target module in one forward pass."""

    step: StepRouting
    index: int

    @property
    def weights(self) -> Tensor:
        """[D, W]: the module's part of the step's rows, in their dtype."""
        return self.step.row_weights[self.index]

    @property
    def rows(self) -> Tensor:
        """[T] int64: the row of each token among the D."""
        return self.step.rows

    @property
    def token_weights(self) -> Tensor:
        """[T, W] in the compute dtype: weights[rows]."""
        if self.step.by_slot:
            return self.weights.index_select(0, self.rows).to(self.step.dtype)
        return self.step.token_weights[self.index]


@dataclass(frozen=True)
class Gathered:
    """The rows of a table that the tokens of one step read."""

    slots: tuple[int, ...]  # [T]
    position: dict[int, int]  # each distinct slot's row in `weights`
    weights: Tensor  # [D, M, W] float32
    rows: Tensor  # [T] int64


class RoutingTable:
    """Routing weights on the device: `slots` rows of [M, W], of which row 0 is the base model's."""

    def __init__(
        self,
        slots: int,
        modules: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        planner: Planner | None = None,
        max_tokens: int = 0,
    ) -> None:
        """`max_tokens` is the size of the largest step; only steps that read by slot need it."""
        self._planner = planner or SharedOnly()
        self._last = SHARED
        self._gathered: Gathered | None = None
        self.weights = torch.zeros(slots, modules, width, device=device, dtype=dtype)
        self._tokens = TokenBuffers(max_tokens, device) if reads_by_slot(device) else None

    def write(self, slot: int, weights: Tensor) -> None:
        """Fill one row with M * W `weights`. Slot 0, which base requests read, stays zero."""
        assert slot > 0, "slot 0 is the base model"
        self._planner.forget(slot)
        self._gathered = None
        self.weights[slot].copy_(weights.view(self.weights.shape[1:]))

    def step(self, slots: Sequence[int], dtype: torch.dtype) -> StepRouting | None:
        """The routing of a packed batch whose token t belongs to `slots[t]`.

        None if every token belongs to the base model: layers then add nothing at all. By slot, the
        buffers of rows then hold zeros, which is the same to a graph that has layers in it.
        """
        if not any(slots):
            if self._tokens is not None:
                self._tokens.fill((), SHARED)
            return None
        if self._tokens is not None:
            plan = self._plan(slots, {slot: slot for slot in sorted(set(slots))})
            rows, places = self._tokens.fill(tuple(slots), plan)
            return StepRouting(self.weights, rows, dtype, plan, True, places)
        gathered = self._gather(tuple(slots))
        plan = self._plan(slots, gathered.position)
        return StepRouting(gathered.weights, gathered.rows, dtype, plan)

    def _plan(self, slots: Sequence[int], position: dict[int, int]) -> StepPlan:
        plan = self._planner.plan(slots, position)
        log_change(self._last, plan)
        self._last = plan
        return plan

    def _gather(self, slots: tuple[int, ...]) -> Gathered:
        """The rows of a step; the last step's, as long as the same requests go on."""
        if self._gathered is None or self._gathered.slots != slots:
            position = {slot: row for row, slot in enumerate(sorted(set(slots)))}
            device = self.weights.device
            rows = torch.tensor([position[slot] for slot in slots], device=device)
            weights = self.weights[torch.tensor(list(position), device=device)].float()
            self._gathered = Gathered(slots, position, weights, rows)
        return self._gathered


class TokenBuffers:
    """What kernels read of each token of a step, at addresses that stay the same.

    Tokens beyond those of a step read what a token of the base model reads.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self._rows = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self._places = torch.full_like(self._rows, -1)
        self._slots: tuple[int, ...] = ()  # in the buffers now
        self._plan = SHARED

    def fill(self, slots: tuple[int, ...], plan: StepPlan) -> tuple[Tensor, Tensor]:
        """The rows and the places of a step's tokens: views [T] of the buffers.

        Copies only what has changed since the last step. Raises AssertionError where there are more
        tokens than the buffers hold.
        """
        tokens = len(slots)
        assert tokens <= len(self._rows), f"{tokens} tokens, the table is for {len(self._rows)}"
        written = max(tokens, len(self._slots))
        if slots != self._slots:
            self._put(self._rows, slots, written, 0)
        if (slots, plan.places) != (self._slots, self._plan.places):
            numbers = {slot: place.number for slot, place in plan.places}
            self._put(self._places, [numbers.get(slot, -1) for slot in slots], written, -1)
        self._slots, self._plan = slots, plan
        return self._rows[:tokens], self._places[:tokens]

    def _put(self, buffer: Tensor, values: Sequence[int], size: int, rest: int) -> None:
        """Write the values, and `rest` as far as `size`; the host does not wait for the copy."""
        whole = torch.tensor([*values, *[rest] * (size - len(values))], dtype=torch.int64)
        buffer[:size].copy_(whole, non_blocking=True)
