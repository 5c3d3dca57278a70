"""A training step on a card is not bound by launches: composing does not go layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.kernels.training_ops import Count, count_base, count_method
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.model.multi_task import LayerStack, MultiTaskModel
from support.small_model import SPECS, spec_id

MODULES = 7  # a layer

MOST_A_MODULE = {"rank": 10, "pair": 8, "leaf": 8, "bond": 16, "token": 36}
"""Kernels that adapters add to a module, forward and backward, by where routing happens."""

SPACES = {
    "tensorpoly-2": "leaf",
    "tensorpoly-x": "bond",
    "trex-static": "pair",
    "trex-mix": "token",
    "trex-diagonal": "token",
    "molora": "token",
    "sira": "token",
}
RESULT = Path(__file__).parents[2] / "results" / "training_ops.md"


@pytest.fixture(scope="module")
def base() -> Count:
    return count_base()


def most(spec: AdapterSpec) -> int:
    return MODULES * MOST_A_MODULE[SPACES.get(spec_id(spec), "rank")]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_adapters_start_few_kernels_a_layer(base: Count, spec: AdapterSpec) -> None:
    found = count_method(spec)
    assert 0 < found.layer - base.layer <= most(spec)
    own = f"| {spec_id(spec)} | {found.layer - base.layer:g} |"
    assert own in RESULT.read_text(), "run python -m bench.kernels.training_ops again"


def test_composing_layer_by_layer_is_seen(base: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong case: a stack for every layer, whatever its shape."""
    make = MultiTaskModel.__init__

    def make_alone(model: MultiTaskModel, adapted: AdaptedModel, tasks: int, *, seed: int) -> None:
        make(model, adapted, tasks, seed=seed)
        model._stacks = [LayerStack((layer,)) for layer in adapted.layers]

    monkeypatch.setattr(MultiTaskModel, "__init__", make_alone)
    spec = AdapterSpec("tensorpoly-1", rank=3, experts=5)
    assert count_method(spec).layer - base.layer > most(spec)
