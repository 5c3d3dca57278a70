"""What adapters cost at a layer's shapes, beside the frozen product alone, on this CPU.

`python -m bench.kernels.layers`: SmolLM2-135M's and an 8B Llama's shapes. Weights are cold,
as they are in a model whose layers do not fit in the cache: each call takes the next of several
copies. The last line is one JSON document.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.kernels.cpu.build import why_not_compiled
from polyrex.kernels.cpu.rank_space import LayerModule, RankSpaceLayer
from polyrex.kernels.roofline.device_limits import measure_device
from polyrex.kernels.roofline.roofline import DeviceLimits, predict_layer
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import Entry, Plan, Run

EXPERTS, RANK = 8, 16
SHAPES_8B = {
    "q, o": (4096, 4096, 2),
    "k, v": (4096, 1024, 2),
    "gate, up": (4096, 14336, 2),
    "down": (14336, 4096, 1),
}
"""d_in, d_out, and how many of a block's seven projections have them."""
SHAPES_135M = {
    "q, o": (576, 576, 2),
    "k, v": (576, 192, 2),
    "gate, up": (576, 1536, 2),
    "down": (1536, 576, 1),
}
TOKENS = (1, 8, 32, 256, 2048)
DISTINCT = (1, 8, 32)
CACHE_BYTES = 256 << 20  # of copies to go through before one comes again


@dataclass(frozen=True)
class Case:
    """One layer, with copies of its weights and of its adapters' side by side."""

    weights: list[Tensor]
    layers: list[RankSpaceLayer]
    d_in: int
    d_out: int

    @classmethod
    def of(cls, d_in: int, d_out: int, dtype: torch.dtype) -> Case:
        copies = max(1, CACHE_BYTES // (2 * d_in * d_out))
        weights = [torch.randn(d_out, d_in).mul_(0.02).to(dtype) for _ in range(copies)]
        return cls(weights, [_layer(d_in, d_out, dtype) for _ in range(copies)], d_in, d_out)


def _layer(d_in: int, d_out: int, dtype: torch.dtype) -> RankSpaceLayer:
    a = torch.randn(1, EXPERTS * RANK, d_in).mul_(0.02).to(dtype)
    b = torch.randn(1, EXPERTS * RANK, d_out).mul_(0.02).to(dtype)
    module = LayerModule(0, a, b, slice(0, d_in), slice(0, d_out), 0)
    return RankSpaceLayer([module], EXPERTS, EXPERTS)


def routing(
    tokens: int, distinct: int, dtype: torch.dtype, composed: bool, key: object = "kept"
) -> StepRouting:
    """Tokens of `distinct` tasks, each task's in one run; at most one task a token.

    Layers compose a task's adapter where they do not hold it under `key`.
    """
    tasks = min(tokens, distinct)
    rows = torch.arange(tokens) * tasks // tokens
    plan = Plan("shared", "asked for")
    if composed:
        bounds = [int((rows < task).sum()) for task in range(tasks + 1)]
        pairs = enumerate(itertools.pairwise(bounds))
        runs = tuple(Run(b, e, task, Entry(task, key)) for task, (b, e) in pairs)
        plan = Plan("composed", "asked for", runs)
    weights = torch.rand(tasks, 1, EXPERTS)
    return StepRouting(weights / weights.sum(-1, keepdim=True), rows, dtype, plan=plan)


def median_seconds(calls: Iterator[Callable[[], object]], budget: float = 0.4) -> float:
    """Median time of calls, as many as fit in `budget` seconds, at least five."""
    next(calls)()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < budget:
        call = next(calls)
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure(case: Case, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the frozen product, and of what the adapters add to it, by path and tasks."""
    x = torch.randn(tokens, case.d_in).to(dtype)
    y = torch.zeros(tokens, case.d_out, dtype=dtype)
    weights = itertools.cycle(case.weights)
    found = {"base": median_seconds(partial(F.linear, x, w) for w in weights)}
    for distinct in DISTINCT:
        for path in ("shared", "composed"):
            step = routing(tokens, distinct, dtype, path == "composed")
            layers = itertools.cycle(case.layers)
            for layer in case.layers:
                layer.add_(y, x, step)  # composes, once
            calls = (partial(layer.add_, y, x, step) for layer in layers)
            found[f"{path} {distinct}"] = median_seconds(calls)
    layers = itertools.cycle(case.layers)
    fresh = (routing(tokens, 1, dtype, True, object()) for _ in itertools.count())
    calls = (partial(layer.add_, y, x, step) for layer, step in zip(layers, fresh, strict=False))
    found["composed 1, not kept"] = median_seconds(calls)
    return found


def shapes(named: dict[str, tuple[int, int, int]], dtype: torch.dtype) -> dict[str, Any]:
    """Every shape at every number of tokens."""
    if reason := why_not_compiled():
        raise SystemExit(f"there is nothing to measure: {reason}")
    seconds = {}
    with torch.inference_mode():
        for name, (d_in, d_out, _) in named.items():
            case = Case.of(d_in, d_out, dtype)
            for tokens in TOKENS:
                key = f"{name} {d_in}x{d_out}, {tokens} tokens"
                seconds[key] = measure(case, tokens, dtype)
                print(f"{key}: {seconds[key]}", flush=True)
    return seconds


def overhead(named: dict[str, tuple[int, int, int]], seconds: dict[str, Any], tokens: int) -> float:
    """What 32 tasks add to a block's seven frozen products, as a share of them."""
    base = added = 0.0
    for name, (d_in, d_out, count) in named.items():
        found = seconds[f"{name} {d_in}x{d_out}, {tokens} tokens"]
        base += count * found["base"]
        added += count * min(found["shared 32"], found["composed 32"])
    return added / base


def predictions(
    named: dict[str, tuple[int, int, int]], device: DeviceLimits
) -> dict[str, dict[str, float]]:
    """What the roofline says of every shape, 32 tasks."""
    return {
        f"{name} {d_in}x{d_out}, {tokens} tokens": predict_layer(
            d_in,
            d_out,
            tokens=tokens,
            distinct=min(tokens, 32),
            experts=EXPERTS,
            rank=RANK,
            device=device,
        )
        for name, (d_in, d_out, _) in named.items()
        for tokens in TOKENS
    }


def layers_8b() -> dict[str, Any]:
    """The 8B model's shapes in bfloat16: seconds, as measured and as the roofline predicts them,
    and what 32 tasks add at 32 tokens.
    """
    seconds: dict[str, Any] = {}
    limits = [measure_device()]
    for name, shape in SHAPES_8B.items():
        seconds |= shapes({name: shape}, torch.bfloat16)
        limits.append(measure_device())  # again: a shared machine's speed changes meanwhile
    best = DeviceLimits(max(at.bandwidth for at in limits), max(at.flops for at in limits))
    return {
        "seconds": seconds,
        "predicted": predictions(SHAPES_8B, best),
        "overhead_distinct32": round(overhead(SHAPES_8B, seconds, 32), 3),
    }


def main() -> None:
    """The command line."""
    document = {"8b": layers_8b()}
    for dtype in (torch.bfloat16, torch.float32):
        document[f"135m {dtype}"] = {"seconds": shapes(SHAPES_135M, dtype)}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
