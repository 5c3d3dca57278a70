"""Builds the served layers of one model, and the planner of their steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from polyrex.adapters.methods.protocol import Experts
from polyrex.kernels.leaf_states import LeafStates
from polyrex.kernels.places import Places
from polyrex.kernels.routing import reads_by_slot
from polyrex.kernels.step_plan import Planner, SharedOnly, SharedOrComposed, TaskStates

from .backends import choose
from .layers import ServedLayer, Slice, StepContext

logger = logging.getLogger(__name__)


class LayerBuilder:
    """Freezes the experts of one model's layers for products in `dtype` on `device`.

    `state_bytes` is what all layers together may keep for single tasks; `context` is where the
    engine puts each step's routing for them.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        state_bytes: int,
        context: StepContext | None = None,
    ) -> None:
        self._dtype, self._device, self._state_bytes = dtype, device, state_bytes
        self.context = context or StepContext()
        earlier = self.context.states
        # Layers of an earlier builder are gone now, and with them what CUDA graphs read of them.
        self._states = LeafStates(dtype, 0 if earlier is None else earlier.generation + 1)
        self.context.states = self._states
        self._layers: list[ServedLayer] = []
        self._logged: set[str] = set()

    def build(self, slices: Sequence[Slice]) -> ServedLayer:
        """The adapters of one layer, whose modules are all of one method.

        Raises TensorMismatch where the dtype cannot hold the experts.
        """
        choice = choose(slices, self._dtype, self._device)
        method = slices[0].experts.method
        self._log(f"{method}: adapters run on {choice.backend.name} ({choice.reason})")
        self._layers.append(choice.backend.build(slices, self._dtype, self._states))
        return self._layers[-1]

    def planner(self, experts: Experts, tasks: int = 0) -> Planner:
        """Decides how steps run over the layers built so far, all of the method of `experts`.

        On a GPU there is room for at least `tasks` of them, so that their states need not move.
        """
        task_bytes = sum(layer.state_bytes for layer in self._layers)
        if not task_bytes:
            return SharedOnly()
        kept = Places[int](self._state_bytes // task_bytes)
        if reads_by_slot(self._device):
            kept.capacity = max(kept.capacity, tasks)
        self._states.reserve(kept.capacity)
        size = f"{task_bytes / 1e6:.1f} MB each"
        self._log(f"{experts.method}: up to {kept.capacity} tasks kept ready, {size}")
        if experts.space in ("leaf", "bond"):
            return TaskStates(kept)
        return SharedOrComposed(kept, experts.spec.experts)

    def _log(self, line: str) -> None:
        """Once for all layers."""
        if line not in self._logged:
            self._logged.add(line)
            logger.info("%s", line)
