"""A pytest plugin that plants a defect: layers give each token what its neighbour should get.

Tests of served layers that pass with it would prove nothing (`parts/triton_tests.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import ServedLayer, Slice
from polyrex.kernels.routing import StepRouting


@pytest.fixture(autouse=True)
def planted_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every builder of layers build them with the defect."""
    build = LayerBuilder.build

    def build_shifted(self: LayerBuilder, slices: Sequence[Slice]) -> ServedLayer:
        layer = build(self, slices)
        add_ = layer.add_

        def add_shifted_(y: Tensor, x: Tensor, step: StepRouting) -> None:
            added = y.new_zeros(y.shape)
            add_(added, x, step)
            y += added.roll(1, 0)

        monkeypatch.setattr(layer, "add_", add_shifted_)
        return layer

    monkeypatch.setattr(LayerBuilder, "build", build_shifted)
