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

from bench.cases import SHAPES_8B, TOKENS
from bench.kernels.layers import median_seconds, overhead, routing

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
    four times of it (median of all shapes). And where it puts one path far ahead, over the seven
    projections of a block, that path is the faster one.
    """
    names = {"base": "base", "shared": "shared 32", "composed": "composed 32"}
    over: dict[str, list[float]] = {path: [] for path in names}
    bounds = {tokens: dict.fromkeys(names, 0.0) for tokens in TOKENS}
    times = {tokens: dict.fromkeys(names, 0.0) for tokens in TOKENS}
    for (name, (d_in, d_out, count)), tokens in itertools.product(SHAPES_8B.items(), TOKENS):
        shape = f"{name} {d_in}x{d_out}, {tokens} tokens"
        measured, predicted = layers["seconds"][shape], layers["predicted"][shape]
        for path, key in names.items():
            over[path].append(measured[key] / predicted[path])
            bounds[tokens][path] += count * predicted[path]
            times[tokens][path] += count * measured[key]
    wrong = [f"{path} beats it: {min(each)}" for path, each in over.items() if min(each) < 0.8]
    for path in ("base", "shared"):
        if not statistics.median(over[path]) <= 4:
            wrong.append(f"{path} is {statistics.median(over[path])} times slower")
    for tokens in TOKENS:
        ahead = bounds[tokens]["composed"] / bounds[tokens]["shared"]
        found = times[tokens]["composed"] / times[tokens]["shared"]
        if max(ahead, 1 / ahead) > 2 and (ahead > 1) != (found > 1):
            wrong.append(f"{tokens} tokens: the other path is faster")
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
