"""Times the Triton kernels on a CUDA device at the layer shapes of an 8B model.

    python -m bench.kernels.triton

Prints one line of JSON: for each kernel and number of tokens the microseconds of a call, and the
bandwidth and throughput that it reaches. `base` is the product of the frozen layer: kernels can
hope for what the device reaches there. Calls are replayed as a CUDA graph and take copies of the
weights in turn, so that neither launches nor a warm L2 distort what a model's layers would cost.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.testing import do_bench_cudagraph

from bench.cases import EXPERTS, RANK, SHAPES_8B, TOKENS
from bench.harness import command_line, report
from polyrex.kernels.gpu.factored import factored_expand, factored_shrink
from polyrex.kernels.gpu.pair_space import pair_shrink
from polyrex.kernels.gpu.rank_space import routed_expand, routed_shrink
from polyrex.kernels.leaf_size import leaf_size

D_IN, D_OUT, _ = SHAPES_8B["gate, up"]
WORKING_SET = 128 << 20  # bytes of weights in turn, beyond any L2
REPEAT_MS = 20


class Work(NamedTuple):
    """One kernel's call on the weights that it is given.

    `moved` are the other tensors that it reads or writes; one that it adds to counts twice.
    """

    name: str
    call: Callable[..., object]
    weights: tuple[Tensor, ...]
    moved: tuple[Tensor, ...]
    flops: int


def works(tokens: int) -> Iterator[Work]:
    """Every kernel at `tokens` tokens, each token of its own task."""

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
        sides = leaves(sets, leaf_size(D_IN, 2)), leaves(sets, leaf_size(D_OUT, 2))
        yield Work(f"{name} shrink", partial(shrink, **routing), sides[0], (x,), one_in * factor)
        yield Work(f"{name} expand", partial(expand, **routing), sides[1], added, one_out * factor)


def microseconds(work: Work) -> float:
    """The median time of one call among many, each on the next copy of the weights."""
    size = sum(tensor.nbytes for tensor in work.weights)
    copies = min(max(WORKING_SET // size, 2), 128)
    weights = itertools.cycle(
        [tuple(tensor.clone() for tensor in work.weights) for _ in range(copies)]
    )
    torch.cuda.synchronize()
    return 1e3 * float(
        do_bench_cudagraph(lambda: work.call(*next(weights)), rep=REPEAT_MS, return_mode="median")
    )


def main() -> None:
    """The command."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures a GPU, and this machine has no CUDA device")
    options = command_line(__doc__).parse_args()
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
    report({"device": torch.cuda.get_device_name(), "measured": measured}, options.out)


if __name__ == "__main__":
    main()
