"""What the layer benchmark asks for is what it says."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.kernels.layer_bench import median_seconds, overhead, routing

RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize(("tokens", "distinct"), [(1, 32), (8, 8), (32, 1), (32, 32), (50, 8)])
def test_runs_cover_every_token_with_its_own_row(tokens: int, distinct: int) -> None:
    step = routing(tokens, distinct, torch.float32, composed=True)
    assert len(step.plan.runs) == len(step.weights) == min(tokens, distinct)
    covered = [run.row for run in step.plan.runs for _ in range(run.begin, run.end)]
    assert covered == step.rows.tolist()
    assert routing(tokens, distinct, torch.float32, composed=False).plan.runs == ()


def test_overhead_is_the_faster_path_over_all_seven_products() -> None:
    shapes = {"a": (2, 4, 2), "b": (4, 2, 1)}
    seconds = {
        "a 2x4, 32 tokens": {"base": 1.0, "shared 32": 0.2, "composed 32": 0.3},
        "b 4x2, 32 tokens": {"base": 2.0, "shared 32": 0.9, "composed 32": 0.4},
    }
    assert overhead(shapes, seconds, 32) == pytest.approx((2 * 0.2 + 0.4) / (2 * 1 + 2))


def test_first_call_is_not_counted() -> None:
    called = []
    calls = (lambda n=n: called.append(n) for n in itertools.count())
    assert median_seconds(calls, budget=0) >= 0
    assert called == [0, 1, 2, 3, 4, 5]


def unlike_the_roofline(layers: dict[str, Any]) -> list[str]:
    """Where measured layers are not what the roofline says; empty where they are.

    It is a bound: nothing is faster, but for the spread of two measurements. Layers come within
    four times of it (median of all shapes). And where it puts one path far ahead, the other is not
    the faster one, but for that spread.
    """
    names = {"base": "base", "shared": "shared 32", "composed": "composed 32"}
    times = {
        shape: {path: (found[names[path]], predicted) for path, predicted in paths.items()}
        for (shape, paths), found in zip(
            layers["predicted"].items(), layers["seconds"].values(), strict=True
        )
    }
    wrong = []
    for path in names:
        over = {shape: found[path][0] / found[path][1] for shape, found in times.items()}
        wrong += [f"{shape}: {path} beats it" for shape, ratio in over.items() if ratio < 0.8]
        if path != "composed" and not statistics.median(over.values()) <= 4:
            wrong.append(f"{path} is {statistics.median(over.values())} times slower")
    for shape, found in times.items():
        (shared, shared_bound), (composed, composed_bound) = found["shared"], found["composed"]
        ahead = composed_bound / shared_bound
        slower = composed / shared if ahead > 1 else shared / composed
        if max(ahead, 1 / ahead) > 2 and slower < 0.8:
            wrong.append(f"{shape}: {ahead} says the other path is faster")
    return wrong


def test_roofline_holds_for_the_layers_that_were_measured() -> None:
    document = json.loads((RESULTS / "bench_vllm.json").read_text())
    layers = document["figures"]["layers"]
    assert unlike_the_roofline(layers) == []
    for path, factor in itertools.product(("base", "shared"), (0.1, 10)):
        other = copy.deepcopy(layers)
        for predicted in other["predicted"].values():
            predicted[path] *= factor
        assert unlike_the_roofline(other)
    for predicted in layers["predicted"].values():
        predicted["shared"], predicted["composed"] = predicted["composed"], predicted["shared"]
    assert unlike_the_roofline(layers)
