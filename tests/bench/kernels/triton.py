"""Times the Triton kernels on a CUDA device at the layer shapes of an 8B model.

    python -m bench.kernels.triton

Prints one line of JSON: for each kernel and number of tokens the microseconds of a call, and the
bandwidth and throughput that it reaches. `base` is the frozen layer's own product: what the device
gives there is what the kernels can hope for. Calls are replayed as a CUDA graph, each on weights of
its own, so that neither launches nor a warm L2 are measured for what a model's layers would cost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.kernels.gpu.factored import factored_expand, factored_shrink
from polyrex.kernels.gpu.pair_space import pair_shrink
from polyrex.kernels.gpu.rank_space import routed_expand, routed_shrink

TOKENS = (1, 8, 32, 256, 2048)
D_IN, D_OUT, LEAF_IN, LEAF_OUT = 4096, 14336, 64, 120
EXPERTS, RANK = 8, 16
WORKING_SET = 128 << 20  # bytes of weights in turn, beyond any L2
REPLAYS = 20


class Work(NamedTuple):
    """A kernel's call, which gets the weights; what else it moves (what is added to in place counts
    twice); its floating-point operations."""

    name: str
    call: Callable[..., object]
    weights: tuple[Tensor, ...]
    moved: tuple[Tensor, ...]
    flops: int


def works(tokens: int) -> Iterator[Work]:
    """Every kernel at `tokens` tokens, each of a task of its own."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    def leaves(sets: int, leaf: int) -> tuple[Tensor, Tensor]:
        return normal(sets, RANK, leaf), normal(sets, RANK, leaf)

    x, y, h = normal(tokens, D_IN), normal(tokens, D_OUT), normal(tokens, RANK).float()
    w, one = normal(tokens, EXPERTS), normal(tokens, 1).fill_(1)
    pairs, rows = normal(tokens, RANK, RANK), torch.arange(tokens, device="cuda")
    base, a, b = (normal(D_OUT, D_IN),), normal(EXPERTS * RANK, D_IN), normal(EXPERTS * RANK, D_OUT)
    one_in, one_out = 2 * tokens * RANK * D_IN, 2 * tokens * RANK * D_OUT  # of one dense side
    all_in, all_out, added = one_in * EXPERTS, one_out * EXPERTS, (y, y, h)
    yield Work("base", lambda full: F.linear(x, full), base, (x, y), 2 * tokens * D_IN * D_OUT)
    yield Work("routed_shrink", lambda a: routed_shrink(x, a, w[:, None]), (a,), (x, w), all_in)
    yield Work("routed_expand", lambda b: routed_expand(y, h, b, w), (b,), (*added, w), all_out)
    yield Work("pair_shrink", lambda a: pair_shrink(x, a, pairs), (a[:RANK],), (x, pairs), one_in)
    yield Work("pair_expand", lambda b: routed_expand(y, h, b, one), (b[:RANK],), added, one_out)
    one_set = {"shift": None, "rows": rows, "weights": None}
    all_sets = {"shift": None, "rows": None, "weights": w}
    shrink, expand = partial(factored_shrink, x), partial(factored_expand, y, h)
    for name, sets, routing, factor in (
        ("tensorpoly-1", EXPERTS, all_sets, EXPERTS),
        ("tensorpoly-2", tokens, one_set, 1),
    ):
        sides = leaves(sets, LEAF_IN), leaves(sets, LEAF_OUT)
        yield Work(f"{name} shrink", partial(shrink, **routing), sides[0], (x,), one_in * factor)
        yield Work(f"{name} expand", partial(expand, **routing), sides[1], added, one_out * factor)


def microseconds(work: Work) -> float:
    """The time of one call among many, each on its own copy of the weights."""
    size = sum(tensor.nbytes for tensor in work.weights)
    copies = min(max(WORKING_SET // size, 2), 128)
    weights = [tuple(tensor.clone() for tensor in work.weights) for _ in range(copies)]
    work.call(*weights[0])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in weights:
            work.call(*copy)
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / (REPLAYS * copies)


def main() -> None:
    """The command."""
    if not torch.cuda.is_available():
        sys.exit("triton_bench measures a GPU, and this machine has no CUDA device")
    measured = {}
    for tokens in TOKENS:
        for work in works(tokens):
            time = microseconds(work)
            moved = sum(tensor.nbytes for tensor in (*work.moved, *work.weights))
            measured[f"{work.name} T={tokens}"] = {
                "us": round(time, 2),
                "gb_per_s": round(moved / time / 1e3, 1),
                "tflop_per_s": round(work.flops / time / 1e6, 2),
            }
    print(json.dumps({"device": torch.cuda.get_device_name(), "measured": measured}))


if __name__ == "__main__":
    main()
