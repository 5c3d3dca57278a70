"""What the layer benchmark asks for is what it says."""

from __future__ import annotations

import itertools

import pytest
import torch

from polyrex.kernels.layer_bench import median_seconds, overhead, routing


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
