"""The size of the leaves whose outer product covers a dimension."""

from __future__ import annotations


def leaf_size(dimension: int, order: int) -> int:
    """q = ceil(d ** (1 / N)), exact for perfect powers where the float root is not."""
    q: int = max(1, round(float(dimension) ** (1 / order)))
    while q**order < dimension:
        q += 1
    while (q - 1) ** order >= dimension:
        q -= 1
    return q
