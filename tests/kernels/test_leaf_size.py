"""The size of leaves: the root of the dimension, rounded up."""

from __future__ import annotations

import pytest

from polyrex.kernels.leaf_size import leaf_size


@pytest.mark.parametrize(
    ("dimension", "order", "size"),
    [(64, 2, 8), (65, 2, 9), (2048, 4, 7), (2401, 4, 7), (2402, 4, 8), (5120, 2, 72), (1, 4, 1)],
)
def test_leaf_size_is_the_root_rounded_up(dimension: int, order: int, size: int) -> None:
    assert leaf_size(dimension, order) == size


@pytest.mark.parametrize("root", range(1, 60))
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_leaf_size_is_exact_for_perfect_powers(root: int, order: int) -> None:
    assert leaf_size(root**order, order) == root
    assert leaf_size(root**order + 1, order) == root + 1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("dimension", [1, 2, 16, 17, 81, 192, 576, 1536, 4096, 14336, 28672])
def test_leaf_size_is_the_least_that_covers_the_dimension(dimension: int, order: int) -> None:
    size = leaf_size(dimension, order)
    assert (size - 1) ** order < dimension <= size**order
