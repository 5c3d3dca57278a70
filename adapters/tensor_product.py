"""Factors that are outer products of small leaves: what TLoRA and the TensorPoly methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Norm

LAYER_NORM_EPS = 1e-5


def leaf_size(dimension: int, order: int) -> int:
    """q = ceil(d ** (1 / N)), exact for perfect powers where the float root is not."""
    q: int = max(1, round(float(dimension) ** (1 / order)))
    while q**order < dimension:
        q += 1
    while (q - 1) ** order >= dimension:
        q -= 1
    return q


def outer(first: Tensor, second: Tensor) -> Tensor:
    """Row-wise outer product, flattened with `first` slowest: [..., p], [..., q] -> [..., p*q]."""
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


def layer_norm(factor: Tensor) -> Tensor:
    """LayerNorm without affine over the last two axes, [r, q*q]."""
    shape = list(factor.shape[-2:])
    return torch.nn.functional.layer_norm(factor, shape, eps=LAYER_NORM_EPS)


def tensor_factor(leaves: Tensor, dimension: int, norm: Norm) -> Tensor:
    """The materialised side of TLoRA: leaves [N, ..., r, q] -> [..., r, dimension].

    Row k is the outer product of its N leaves, first leaf slowest, cut to `dimension`. With
    `norm = layer`, N = 2 is normalised over [r, q*q] before the cut; N = 4 normalises the products
    (0, 1) and (2, 3) so, multiplies them out, and does nothing after. The papers' text has no
    normalisation; their released code does, and so do we.
    """
    if norm == "layer" and len(leaves) == 4:
        pairs = layer_norm(outer(leaves[0], leaves[1])), layer_norm(outer(leaves[2], leaves[3]))
        return outer(*pairs)[..., :dimension]
    factor = leaves[0]
    for leaf in leaves[1:]:
        factor = outer(factor, leaf)
    if norm == "layer":
        factor = layer_norm(factor)
    return factor[..., :dimension]
