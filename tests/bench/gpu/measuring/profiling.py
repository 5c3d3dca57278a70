"""Counts what the device does in some steps, and what the host tells it to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")
"""Beginnings of the names of the driver's calls that start work; of a kernel, with any suffix."""


@dataclass
class DeviceWork:
    """What was seen, filled in when the context ends."""

    kernels: int = 0  # copies and fills included
    launches: int = 0
    device_seconds: float = 0.0

    def a_step(self, shorter: DeviceWork, steps: int) -> dict[str, float]:
        """The figures of a step, from a run that has so many steps more than a shorter one.

        What runs do once, such as prompts or the first state of an optimiser, is in neither.
        """
        seconds = self.device_seconds - shorter.device_seconds
        return {
            "kernels": round((self.kernels - shorter.kernels) / steps),
            "launches": round((self.launches - shorter.launches) / steps),
            "device_ms": round(1e3 * seconds / steps, 3),
        }


@contextmanager
def watched(device: torch.device) -> Iterator[DeviceWork]:
    """Within it, count all work of the device; what is still queued at the end belongs to it."""
    work = DeviceWork()
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        yield work
        if cuda:
            torch.cuda.synchronize()
    for event in profiler.key_averages():
        if event.device_type.name == "CUDA":
            work.kernels += event.count
            work.device_seconds += event.self_device_time_total / 1e6
        elif event.key.startswith(LAUNCHES):
            work.launches += event.count
