"""Factors that are outer products of small leaves: what TLoRA and the TensorPoly methods share."""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyrex.adapters.spec import Norm

LAYER_NORM_EPS = 1e-5


def outer(first: Tensor, second: Tensor) -> Tensor:
    """Row-wise outer product, flattened with `first` slowest: [..., p], [..., q] -> [..., p*q]."""
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)


def layer_norm(factor: Tensor) -> Tensor:
    """LayerNorm without affine over the last two axes, [r, q*q]."""
    shape = list(factor.shape[-2:])
    return F.layer_norm(factor, shape, eps=LAYER_NORM_EPS)


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
    factor = _multiply_out(leaves)
    return (layer_norm(factor) if norm == "layer" else factor)[..., :dimension]


def fused_factor(leaves: Tensor, dimension: int, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Leaves [N, ..., r, q] -> [..., r, dimension] in `dtype`; see `tensor_factor` for the formula.

    `tensor_factor` is the slow twin, which reads and writes the whole factor several times, forward
    and backward. For N = 2 the normalisation is folded here into the leaves: row k is
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


def _multiply_out(leaves: Tensor) -> Tensor:
    """[N, ..., r, q] -> [..., r, q**N], first leaf slowest; ones where there are no leaves."""
    if len(leaves) == 0:
        return leaves.new_ones(*leaves.shape[1:-1], 1)
    return reduce(outer, leaves.unbind())


class FactoredSide(NamedTuple):
    """A side of TLoRA that is never built: row k is `first_k (x) second_k - shift`, cut.

    `p * p'` is at least the side's dimension, and the rest of the row falls away.
    """

    first: Tensor  # [..., r, p]
    second: Tensor  # [..., r, p']
    shift: Tensor | None  # [..., 1]

    def take(self, rows: Tensor) -> FactoredSide:
        """The side of each token, from sides with one leading axis of D distinct rows."""
        if len(self.first) == 1:  # one task: all tokens share a side, and its products are GEMMs
            rows = torch.zeros((), dtype=torch.long, device=rows.device)
        shift = None if self.shift is None else self.shift[rows]
        return FactoredSide(self.first[rows], self.second[rows], shift)


def factor_leaves(leaves: Tensor, norm: Norm) -> FactoredSide:
    """The factored form of `tensor_factor(leaves, dimension, norm)`, leaves [N, ..., r, q].

    The leaves are multiplied out to two halves, about the square root of the dimension each. For
    N = 2, mean and variance over [r, q*q] have a closed form in the leaves, as LayerNorm has no
    affine: `mean = sum_k (sum_i a0_ki)(sum_j a1_kj) / (r q^2)`, and the mean of squares likewise.
    For N = 4 the normalised products of two leaves are the halves.
    """
    if norm == "layer" and len(leaves) == 4:
        return FactoredSide(
            layer_norm(outer(leaves[0], leaves[1])), layer_norm(outer(leaves[2], leaves[3])), None
        )
    middle = (len(leaves) + 1) // 2
    first, second = _multiply_out(leaves[:middle]), _multiply_out(leaves[middle:])
    if norm == "none":
        return FactoredSide(first, second, None)
    mean, variance = outer_moments(first, second)
    scale = torch.rsqrt(variance + LAYER_NORM_EPS)
    return FactoredSide(first * scale, second, (mean * scale).squeeze(-1))


def outer_moments(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over [r, p*q] of the row-wise outer product of [..., r, p] and [..., r, q].

    In closed form, from sums over the leaves alone; both results are [..., 1, 1].
    """
    count = first.shape[-2] * first.shape[-1] * second.shape[-1]
    total = (first.sum(-1) * second.sum(-1)).sum(-1)
    squares = (first.square().sum(-1) * second.square().sum(-1)).sum(-1)
    mean = total / count
    # Rounding may put the variance of nearly constant products below 0.
    variance = (squares / count - mean.square()).clamp_min(0)
    return mean[..., None, None], variance[..., None, None]


def factored_shrink(x: Tensor, side: FactoredSide) -> Tensor:
    """A x without A: [T, d_in] -> [T, r], for one side, or one a token ([T, r, p] leaves).

    Row k is `first_k^T X second_k - shift * sum(X)`, with X = x padded with zeros to p x p'.
    """
    first, second, shift = side
    p, q = first.shape[-1], second.shape[-1]
    grid = F.pad(x, (0, p * q - x.shape[-1])).view(len(x), p, q)
    shrunk = (torch.matmul(grid, second.transpose(-1, -2)) * first.transpose(-1, -2)).sum(1)
    return shrunk if shift is None else shrunk - shift * x.sum(-1, keepdim=True)


def factored_expand(hidden: Tensor, side: FactoredSide, dimension: int) -> Tensor:
    """B h without B: [T, r] -> [T, dimension], where row k of B's transpose is row k of `side`.

    `sum_k h_k (first_k (x) second_k) - shift * sum_k h_k`, cut to `dimension`.
    """
    first, second, shift = side
    weighted = hidden.unsqueeze(1) * first.transpose(-1, -2)  # [T, p, r]
    if shift is None:
        return torch.matmul(weighted, second).flatten(1)[:, :dimension]
    level = (shift * hidden.sum(-1, keepdim=True)).unsqueeze(-1)
    rows = second.expand(len(hidden), -1, -1)
    return torch.baddbmm(level, weighted, rows, beta=-1).flatten(1)[:, :dimension]
