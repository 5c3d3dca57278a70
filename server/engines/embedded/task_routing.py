"""The routing table of an embedded engine: which tasks are in it, and what each step reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from polyrex.adapters.files.inventory import Inventory
from polyrex.adapters.files.task import TaskVersion
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.kernels.routing import RoutingTable
from polyrex.server.config import EmbeddedConfig
from polyrex.server.engines.slots import SlotCache


class TaskRouting:
    """Puts the tasks of running requests in the routing table, and routes steps by it.

    `slots` gives a request the slot of its task.
    """

    def __init__(self, adapted: AdaptedModel, inventory: Inventory, config: EmbeddedConfig) -> None:
        """Make the model's layers add their adapters, routed by what `route` sets."""
        device = next(adapted.model.parameters()).device
        self._dtype = adapted.dtype
        planner, self._context = adapted.serve(self._dtype, config.state_bytes)
        self._table = RoutingTable(config.slots, *inventory.table_shape, device, planner=planner)
        self._steps: Counter[str] = Counter()
        self.slots = SlotCache(config.slots, self._write)

    @property
    def steps(self) -> Counter[str]:
        """The number of steps with adapters so far, by path (kernels/step_plan.py)."""
        return self._steps.copy()

    def route(self, slots: Sequence[int]) -> None:
        """Set the routing of the next forward pass, whose token t belongs to `slots[t]`."""
        step = self._context.step = self._table.step(slots, self._dtype)
        if step is not None:
            self._steps[step.plan.path] += 1

    def _write(self, slot: int, task: TaskVersion) -> None:
        self._table.write(slot, task.router.weights)
