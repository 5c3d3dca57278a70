"""The routing table of an embedded engine: which tasks are in it, and what each step reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

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

    def __init__(
        self,
        adapted: AdaptedModel,
        inventory: Inventory,
        config: EmbeddedConfig,
        device: torch.device,
        max_tokens: int,
    ) -> None:
        """Make the model's layers add their adapters, routed by what `route` sets.

        `max_tokens` is the most that one step holds, with its padding.
        """
        self._dtype = adapted.dtype
        # A GPU waits for launches; a CPU does not, and has its weights mapped from their file.
        pack = device.type == "cuda"
        tasks = min(config.max_running, config.slots - 1)
        planner, self._context = adapted.serve(
            self._dtype, config.state_bytes, tasks=tasks, pack=pack
        )
        shape = config.slots, *inventory.table_shape
        self._table = RoutingTable(*shape, device, planner=planner, max_tokens=max_tokens)
        self._steps: Counter[str] = Counter()
        self.slots = SlotCache(config.slots, self._write)

    @property
    def steps(self) -> Counter[str]:
        """The number of steps with adapters so far, by path (kernels/step_plan.py)."""
        return self._steps.copy()

    @property
    def generation(self) -> int:
        """It increases when tensors that the layers read have moved."""
        return self._context.generation

    def route(self, slots: Sequence[int]) -> bool:
        """Set the routing of the next forward pass, whose token t belongs to `slots[t]`.

        Returns whether adapters will be added.
        """
        step = self._table.step(slots, self._dtype)
        self._context.set(step)
        if step is not None:
            self._steps[step.plan.path] += 1
        return step is not None

    def rehearse(self, tokens: int, *, adapters: bool) -> None:
        """Set the routing of a forward pass that answers nobody, and is not counted.

        With `adapters`, its first token belongs to whatever is in slot 1.
        """
        self._context.set(self._table.step([int(adapters), *[0] * (tokens - 1)], self._dtype))

    def _write(self, slot: int, task: TaskVersion) -> None:
        self._table.write(slot, task.router.weights)
