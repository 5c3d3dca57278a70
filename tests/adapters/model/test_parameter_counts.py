"""Parameter counts: the papers' figures from module shapes, and what training really makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyrex.adapters.errors import FileError, SpecError
from polyrex.adapters.methods.registry import METHODS, make_experts
from polyrex.adapters.model.attach import find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.parameter_counts import (
    ParameterCounts,
    abbreviate,
    base_targets,
    count_parameters,
    describe,
)
from polyrex.adapters.spec import AdapterSpec

T0_TASKS = 313


def on_t0(method: str, rank: int = 16, experts: int = 1, **more: int) -> ParameterCounts:
    spec = AdapterSpec(method, rank=rank, experts=experts, **more)  # type: ignore[arg-type]
    return count_parameters(spec, base_targets("t0-3b"), T0_TASKS)


def test_t0_has_432_modules() -> None:
    assert on_t0("lora").modules == 432


# The scalar gates are ours, one a module: 432 parameters that change no printed digit.
@pytest.mark.parametrize(
    ("published", "method", "sizes"),
    [
        ("2.2M", "lora", {"rank": 1}),
        ("1.4M", "tlora", {"order": 2}),
        ("12.2M", "tensorpoly-1", {"experts": 8, "order": 2}),
        ("4.3M", "tensorpoly-1", {"experts": 8, "order": 4}),
        ("13.3M", "tensorpoly-2", {"experts": 8, "order": 2}),
        ("33.2M", "tensorpoly-2", {"experts": 20, "order": 2}),
        ("7.6M", "tensorpoly-2", {"experts": 8, "order": 4}),
    ],
)
def test_multi_task_parameters_are_those_published(
    published: str, method: str, sizes: dict[str, int]
) -> None:
    assert abbreviate(on_t0(method, **sizes).multi_task) == published


def test_poly_of_8_experts_has_17_million_published_without_rounding_up() -> None:
    # The paper cuts 17.7M, and leaves the routing out.
    assert on_t0("poly", rank=1, experts=8).experts // 10**6 == 17


def test_tensorpoly_1_of_20_experts_is_published_without_its_routing() -> None:
    assert abbreviate(on_t0("tensorpoly-1", experts=20).experts) == "27.8M"


@pytest.mark.parametrize(
    ("published", "method", "sizes"),
    [
        ("3.5k", "poly", {"rank": 1, "experts": 8}),
        ("8.6k", "tensorpoly-1", {"experts": 20}),
        ("17.3k", "tensorpoly-2", {"experts": 20}),
    ],
)
def test_routing_parameters_are_those_published(
    published: str, method: str, sizes: dict[str, int]
) -> None:
    assert abbreviate(on_t0(method, **sizes).adaptation) == published


def test_mhr_routing_is_published_to_two_digits() -> None:
    assert round(on_t0("mhr", rank=1, experts=8, splits=64).adaptation, -4) == 220_000


def test_method_without_routing_adapts_all_it_has() -> None:
    counts = on_t0("lora", rank=1)
    assert counts.routing_per_task == 0
    assert counts.adaptation == counts.multi_task == counts.experts


@pytest.mark.parametrize(
    "spec",
    [
        *map(AdapterSpec, sorted(METHODS.keys() - {"sira"})),
        AdapterSpec("sira", rank=4, experts=8),
        AdapterSpec("trex", rank=5, rank_out=3),
        AdapterSpec("trex", rank=5, form="diagonal"),
        AdapterSpec("trex", rank=5, form="static"),
        AdapterSpec("mhr", rank=3, experts=4, splits=2),
        AdapterSpec("tensorpoly-x", experts=3, order=3),
    ],
    ids=lambda spec: f"{spec.method}-{spec.form}-{spec.order}",
)
def test_counts_are_what_is_instantiated(spec: AdapterSpec) -> None:
    targets = base_targets("smollm2-135m-instruct")[:7]
    made = [make_experts(spec, target) for target in targets]
    counts = count_parameters(spec, targets, 1)
    assert counts.experts == sum(p.numel() for experts in made for p in experts.parameters())
    generator = torch.Generator().manual_seed(0)
    router = [experts.initial_logits(spec, generator) for experts in made]
    assert counts.routing_per_task == sum(logits.numel() for logits in router)


def test_named_base_is_the_model_of_that_name(base_path: str) -> None:
    model = load_base(base_path, torch.bfloat16)
    assert base_targets("smollm2-135m-instruct") == find_targets(model)


def test_base_may_be_a_folder(base_path: str) -> None:
    assert base_targets(base_path) == base_targets("smollm2-135m-instruct")


def test_unknown_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="neither t0-3b nor smollm2"):
        base_targets(str(tmp_path))


def test_hyperparameter_that_a_method_does_not_have_is_an_error() -> None:
    with pytest.raises(SpecError, match=r"lora has no experts \(got 8\)"):
        on_t0("lora", experts=8)


def test_description_names_multi_task_and_adaptation() -> None:
    lines = describe(on_t0("tensorpoly-1", experts=8)).splitlines()
    assert lines[0] == "432 target modules"
    assert [line.split()[-1] for line in lines[1:]] == ["11.1M", "3.5k", "12.2M", "3.5k"]
    assert "multi-task (313 tasks)" in lines[3]
    assert "12,215,088" in lines[3]
    assert "adaptation" in lines[4]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (3456, "3.5k"), (2_211_840, "2.2M")]
)
def test_abbreviation(count: int, text: str) -> None:
    assert abbreviate(count) == text
