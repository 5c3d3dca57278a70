"""Times calls as a model would make them: replayed from a CUDA graph, on weights that are cold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from polyrex.kernels.roofline.roofline import DeviceLimits

Call = Callable[[], object]

COLD_BYTES = 128 << 20
"""Bytes of weights that take turns: more than any L2 cache holds."""
MOST_COPIES = 16
GRAPH_CALLS = 48
"""Calls of one graph, so that the start of a replay does not count."""
LONG_SECONDS = 5e-3
"""Where all calls in turn take longer than this, a graph holds each once."""
REPLAYS = 5


def copies_of(size: int, *, dry: bool) -> int:
    """How many copies of weights of `size` bytes take turns."""
    return 2 if dry else min(max(COLD_BYTES // max(size, 1), 2), MOST_COPIES)


def seconds_a_call(calls: Sequence[Call], device: torch.device) -> float:
    """The median time of one of the calls, each of which has weights of its own.

    On CUDA, the calls are captured and replayed, so that launches cost what they cost in an engine
    that holds its steps as graphs. Nothing of what they return is kept.
    """
    if device.type == "cpu":
        return statistics.median(_host_seconds(call) for call in calls)
    _device_seconds(lambda: [call() for call in calls])  # compiles
    once = _device_seconds(lambda: [call() for call in calls])
    rounds = 1 if once > LONG_SECONDS else -(-GRAPH_CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in [*calls] * rounds:
            call()
    _device_seconds(graph.replay)
    found = [_device_seconds(graph.replay) for _ in range(REPLAYS)]
    return statistics.median(found) / (rounds * len(calls))


def _host_seconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _device_seconds(call: Call) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def measure_limits(device: torch.device, dtype: torch.dtype, *, dry: bool) -> DeviceLimits:
    """What this device reaches: the faster of copying and reading memory, and a large product."""
    source = torch.ones((1 << 20) if dry else (1 << 30), dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), 64 if dry else 8192
    words = source.view(torch.int32)
    copied = 2 * source.nbytes / seconds_a_call([lambda: target.copy_(source)], device)
    read = source.nbytes / seconds_a_call([lambda: words.amax()], device)
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = seconds_a_call([lambda: F.linear(x, weight)], device)
    return DeviceLimits(max(copied, read), 2 * side**3 / product)
