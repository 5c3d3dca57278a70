"""TLoRA's factor, materialised and factored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyrex.adapters.methods.tensor_product import (
    FactoredSide,
    factor_leaves,
    factored_expand,
    factored_shrink,
    tensor_factor,
)
from polyrex.adapters.spec import Norm
from polyrex.kernels.leaf_size import leaf_size
from support.cases import relative_rms

TOLERANCE = 1e-5
TOKENS, RANK = 7, 5
FORMS: list[tuple[int, Norm]] = [(2, "layer"), (4, "layer"), (1, "none"), (2, "none"), (3, "none")]


def draw(order: int, dimension: int, *between: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves [N, ..., r, q] whose mean is not 0, tokens [T, d], and hidden values [T, r]."""
    generator = torch.Generator().manual_seed(0)
    shape = order, *between, RANK, leaf_size(dimension, order)
    leaves = torch.randn(shape, generator=generator) + 0.5
    x = torch.randn(TOKENS, dimension, generator=generator) + 0.1
    return leaves, x, torch.randn(TOKENS, RANK, generator=generator)


@pytest.mark.parametrize("dimension", [9, 63, 64, 65, 576])
@pytest.mark.parametrize(("order", "norm"), FORMS)
def test_factored_products_are_those_of_the_factor(order: int, norm: Norm, dimension: int) -> None:
    leaves, x, hidden = draw(order, dimension)
    factor = tensor_factor(leaves, dimension, norm)
    side = factor_leaves(leaves, norm)
    assert relative_rms(factored_shrink(x, side), x @ factor.t()) <= TOLERANCE
    assert relative_rms(factored_expand(hidden, side, dimension), hidden @ factor) <= TOLERANCE


@pytest.mark.parametrize("order", [2, 4])
def test_each_token_may_have_a_side_of_its_own(order: int) -> None:
    leaves, x, hidden = draw(order, 63, 3)
    rows = torch.tensor([2, 0, 1, 1, 0, 2, 2])
    factor = tensor_factor(leaves, 63, "layer")[rows]
    side = factor_leaves(leaves, "layer").take(rows)
    assert relative_rms(factored_shrink(x, side), (factor @ x[..., None])[..., 0]) <= TOLERANCE
    expected = (hidden[:, None] @ factor)[:, 0]
    assert relative_rms(factored_expand(hidden, side, 63), expected) <= TOLERANCE


def no_mean(side: FactoredSide) -> FactoredSide:
    return side._replace(shift=None)


def swapped(side: FactoredSide) -> FactoredSide:
    return side._replace(first=side.second, second=side.first)


def unscaled(side: FactoredSide) -> FactoredSide:
    return side._replace(first=side.first * 1.001)


@pytest.mark.parametrize("wrong", [no_mean, swapped, unscaled])
def test_tolerance_tells_a_wrong_factor(wrong: type[FactoredSide]) -> None:
    leaves, x, hidden = draw(2, 63)
    factor = tensor_factor(leaves, 63, "layer")
    side = wrong(factor_leaves(leaves, "layer"))  # type: ignore[call-arg,arg-type]
    assert relative_rms(factored_shrink(x, side), x @ factor.t()) > 10 * TOLERANCE
    assert relative_rms(factored_expand(hidden, side, 63), hidden @ factor) > 10 * TOLERANCE


# In float32 the variance of these constants comes out as far below 0 as it may above.
@pytest.mark.parametrize("value", [100.0, 123.456, 33.3, 77.7, 1000 / 3])
@pytest.mark.parametrize("size", [7, 8, 24])
def test_constant_leaves_stay_finite(value: float, size: int) -> None:
    leaves = torch.full((2, RANK, size), value)
    side = factor_leaves(leaves, "layer")
    assert torch.isfinite(factored_shrink(torch.ones(1, size**2), side)).all()


def test_row_is_the_outer_product_with_the_first_leaf_slowest() -> None:
    leaves, _, _ = draw(3, 60)
    row = torch.kron(torch.kron(leaves[0, 1], leaves[1, 1]), leaves[2, 1])
    torch.testing.assert_close(tensor_factor(leaves, 60, "none")[1], row[:60])
