"""Measures the limits of this machine's CPU, for the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .roofline import DeviceLimits

_READ_BYTES = 1 << 30  # far beyond any cache
_SIDE = 4096
_SECONDS = 2.0


def measure_device() -> DeviceLimits:
    """The CPU's limits with torch's current threads; takes about five seconds and 1 GiB.

    The bandwidth is that of reading a large buffer once, as weights are read, the throughput that
    of a large bfloat16 product. Both are the best of several runs.
    """
    return DeviceLimits(_read_bandwidth(), _product_throughput())


def _read_bandwidth() -> float:
    buffer = torch.ones(_READ_BYTES // 4, dtype=torch.float32)
    return _READ_BYTES / _least_seconds(lambda: buffer.sum())


def _product_throughput() -> float:
    x, weight = torch.randn(2, _SIDE, _SIDE).bfloat16()
    return 2 * _SIDE**3 / _least_seconds(lambda: F.linear(x, weight))


def _least_seconds(run: Callable[[], object]) -> float:
    """The time of the shortest run among those that fit into `_SECONDS`, after one to warm up."""
    run()
    shortest, begin = float("inf"), time.perf_counter()
    while True:
        started = time.perf_counter()
        run()
        ended = time.perf_counter()
        shortest = min(shortest, ended - started)
        if ended - begin > _SECONDS:
            return shortest
