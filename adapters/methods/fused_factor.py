"""The materialised tensor-product factor in one product a side, forward and backward.

`tensor_product.tensor_factor` is its slow twin: it builds the outer product and then normalises it,
which reads and writes the whole factor several times, and again for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from polyrex.adapters.spec import Norm

from .tensor_product import LAYER_NORM_EPS, layer_norm, outer, outer_moments, tensor_factor


def fused_factor(leaves: Tensor, dimension: int, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Leaves [N, ..., r, q] -> [..., r, dimension] in `dtype`; see `tensor_factor` for the formula.

    For N = 2 the normalisation is folded into the leaves: row k is
    `[a0_k * s, -mean * s] @ [a1_k, 1]` with `s = 1 / sqrt(var + eps)`, a product of inner size 2.
    """
    if norm == "none":
        return tensor_factor(leaves, dimension, norm).to(dtype)
    if len(leaves) == 4:
        # The pairs hold q^2 numbers a row, not d: nothing to save there.
        first, second = (layer_norm(outer(leaves[i], leaves[i + 1])) for i in (0, 2))
        return outer(first.to(dtype), second.to(dtype))[..., :dimension]
    first, second = leaves
    mean, variance = outer_moments(first, second)
    scale = torch.rsqrt(variance + LAYER_NORM_EPS)
    left = torch.stack((first * scale, (-mean * scale).expand_as(first)), -1)  # [..., r, q, 2]
    right = torch.stack((second, torch.ones_like(second)), -2)  # [..., r, 2, q]
    return (left.to(dtype) @ right.to(dtype)).flatten(-2)[..., :dimension]
