"""The committed results of the study: their counts are what the optimisers held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import DEFAULT_BASE, load_base, resolve_base
from polyrex.adapters.model.parameter_counts import ParameterCounts, count_parameters
from polyrex.adapters.spec import TargetModule
from polyrex.training.study.variants import HELD_OUT, UPPER_THIRD, VARIANTS, Variant

RESULTS = Path(__file__).parents[2] / "results"
SUMMARY: dict[str, Any] = json.loads((RESULTS / "study.json").read_text())


@pytest.fixture(scope="module")
def targets() -> tuple[TargetModule, ...]:
    base = load_base(resolve_base(DEFAULT_BASE), torch.bfloat16)
    return find_targets(base, UPPER_THIRD)


def counted(variant: Variant, targets: tuple[TargetModule, ...]) -> tuple[ParameterCounts, Any]:
    cell: dict[str, Any] = json.loads((RESULTS / f"study/train/{variant.name}.json").read_text())
    tasks = len(cell["scores"]) - len(HELD_OUT)
    return count_parameters(variant.spec, targets, tasks), cell


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_tables_count_what_the_optimiser_held(
    variant: Variant, targets: tuple[TargetModule, ...]
) -> None:
    counts, cell = counted(variant, targets)
    held = cell["parameters"]
    assert held["experts"] + held["gates"] + held["token_routers"] == counts.experts
    assert held["routing"] == (
        counts.tasks * counts.routing_per_task if variant.routes_tasks else 0
    )
    assert SUMMARY["methods"][variant.name]["multi_task_params"] == sum(held.values())
    repeated = sorted((RESULTS / "study/train").glob(f"{variant.name}-seed*.json"))
    assert [json.loads(path.read_text())["parameters"] for path in repeated] == (
        [held] * (len(SUMMARY["methods"][variant.name]["held_in_by_seed"]) - 1)
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_variant_is_adapted_in_all_its_modes(
    variant: Variant, targets: tuple[TargetModule, ...]
) -> None:
    counts, _ = counted(variant, targets)
    sizes = {
        "routing": counts.routing_per_task,
        "token-routers": counts.token_routers,
        "modules": counts.experts,
        "both": counts.experts + counts.routing_per_task,
    }
    for mode in variant.modes:
        found = SUMMARY["ablations"][f"{variant.name}-{mode}"]
        assert found["adaptation_params"] == sizes[mode]
        assert set(found["by_task"]) == set(HELD_OUT)
