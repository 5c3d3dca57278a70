"""The cost of adapters in one layer, compared with its frozen product, on this CPU.

`python -m bench.kernels.layers` measures the shapes of SmolLM2-135M and of an 8B Llama. Weights are
cold, as in a model whose layers do not fit in the cache: each call takes the next of several
copies. The last line is one JSON document.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import EXPERTS, RANK, SHAPES_8B, SHAPES_135M, TOKENS, Shapes
from bench.harness import command_line, report, seconds_of
from polyrex.kernels.cpu.build import why_not_compiled
from polyrex.kernels.cpu.rank_space import RankSpaceLayer
from polyrex.kernels.modules import LayerModule
from polyrex.kernels.places import Place
from polyrex.kernels.roofline.device_limits import measure_device
from polyrex.kernels.roofline.roofline import DeviceLimits, predict_layer
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import Run, StepPlan

DISTINCT = (1, 8, 32)
CACHE_BYTES = 256 << 20  # of copies, before one is used again


@dataclass(frozen=True)
class Case:
    """One layer shape, with several copies of its weights and of its adapters."""

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
    """The routing of tokens of `distinct` tasks (or one task a token), in one run for each task.

    Layers compose a task's adapter unless they hold it under `key`.
    """
    tasks = min(tokens, distinct)
    rows = torch.arange(tokens) * tasks // tokens
    plan = StepPlan("shared", "asked for")
    if composed:
        bounds = [int((rows < task).sum()) for task in range(tasks + 1)]
        pairs = enumerate(itertools.pairwise(bounds))
        runs = tuple(Run(b, e, task, Place(task, key)) for task, (b, e) in pairs)
        plan = StepPlan("composed", "asked for", runs)
    weights = torch.rand(tasks, 1, EXPERTS)
    return StepRouting(weights / weights.sum(-1, keepdim=True), rows, dtype, plan=plan)


def median_seconds(calls: Iterator[Callable[[], object]], budget: float = 0.4) -> float:
    """The median time of as many calls as fit in `budget` seconds, but at least five."""
    next(calls)()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < budget:
        seconds.append(seconds_of(next(calls)))
    return statistics.median(seconds)


def layer_seconds(case: Case, tokens: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of the frozen product, and of its adapters by path and number of tasks."""
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


def shape_seconds(shapes: Shapes, dtype: torch.dtype) -> dict[str, Any]:
    """`layer_seconds` of every shape at every number of tokens."""
    if reason := why_not_compiled():
        raise SystemExit(f"there is nothing to measure: {reason}")
    seconds = {}
    with torch.inference_mode():
        for name, (d_in, d_out, _) in shapes.items():
            case = Case.of(d_in, d_out, dtype)
            for tokens in TOKENS:
                key = f"{name} {d_in}x{d_out}, {tokens} tokens"
                seconds[key] = layer_seconds(case, tokens, dtype)
                print(f"{key}: {seconds[key]}", flush=True)
    return seconds


def overhead(shapes: Shapes, seconds: dict[str, Any], tokens: int) -> float:
    """The time that 32 tasks add to a block's seven frozen products, as a share of theirs."""
    base = added = 0.0
    for name, (d_in, d_out, count) in shapes.items():
        found = seconds[f"{name} {d_in}x{d_out}, {tokens} tokens"]
        base += count * found["base"]
        added += count * min(found["shared 32"], found["composed 32"])
    return added / base


def predictions(shapes: Shapes, device: DeviceLimits) -> dict[str, dict[str, float]]:
    """The roofline's seconds of every shape with 32 tasks."""
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
        for name, (d_in, d_out, _) in shapes.items()
        for tokens in TOKENS
    }


def layers_8b() -> dict[str, Any]:
    """The 8B model's shapes in bfloat16: seconds as measured and as the roofline predicts them, and
    the overhead of 32 tasks at 32 tokens.
    """
    seconds: dict[str, Any] = {}
    limits = [measure_device()]
    for name, shape in SHAPES_8B.items():
        seconds |= shape_seconds({name: shape}, torch.bfloat16)
        limits.append(measure_device())  # again: the speed of a shared machine changes
    best = DeviceLimits(max(at.bandwidth for at in limits), max(at.flops for at in limits))
    return {
        "seconds": seconds,
        "predicted": predictions(SHAPES_8B, best),
        "overhead_distinct32": round(overhead(SHAPES_8B, seconds, 32), 3),
    }


def main() -> None:
    """The command."""
    options = command_line(__doc__).parse_args()
    document = {"8b": layers_8b()}
    for dtype in (torch.bfloat16, torch.float32):
        document[f"135m {dtype}"] = {"seconds": shape_seconds(SHAPES_135M, dtype)}
    report(document, options.out)


if __name__ == "__main__":
    main()
