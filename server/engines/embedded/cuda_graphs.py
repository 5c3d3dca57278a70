"""Decode steps as CUDA graphs: the host launches one graph instead of thousands of kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .decode_steps import Replay

_WARM_UPS = 2  # the first one compiles kernels, which a graph cannot hold


class CudaGraphs:
    """Records functions as CUDA graphs that share one pool of memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with its last graph. This one keeps it when all others are dropped.
        self._keeper = self._capture(lambda: torch.zeros(1, device="cuda"))

    def __call__(self, function: Replay) -> Replay:
        """Record a function that launches kernels, and never waits for the device."""
        current = torch.cuda.current_stream()
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                function()
        current.wait_stream(beside)
        replay: Replay = self._capture(function).replay
        return replay

    def _capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the card meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph
