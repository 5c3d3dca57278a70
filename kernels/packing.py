"""Layouts in memory that the compiled operators read, and what they are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 16
"""Floats of one vector register: sizes are padded to multiples of it."""
UNWEIGHTED = -1
"""In place of the offset of a matrix's routing weights: it has none, its weight is 1."""


def padded(size: int) -> int:
    """`size` rounded up to a multiple of LANES."""
    return size + -size % LANES


def pack(matrix: Tensor) -> Tensor:
    """[depth, columns] -> panels of 16 columns, padded with zeros; see csrc/rank_space.cpp.

    float32: [panels, depth, 16]; bfloat16: [panels, depth / 2, 16, 2].
    """
    depth, columns = matrix.shape
    whole = F.pad(matrix, (0, -columns % LANES, 0, -depth % LANES))
    panels = whole.view(len(whole), -1, LANES).transpose(0, 1)
    if matrix.dtype == torch.bfloat16:
        panels = panels.reshape(len(panels), -1, 2, LANES).transpose(2, 3)
    return panels.contiguous()


def by_expert(side: Tensor, experts: int) -> Tensor:
    """[E*r, d] -> [E*R, d]: each expert's rows padded with zeros to R, a multiple of LANES."""
    rank = len(side) // experts
    return F.pad(side.view(experts, rank, -1), (0, 0, 0, -rank % LANES)).flatten(0, 1)


def in_twos(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """[D, n, c] with an even n -> [D, n * c] in `dtype`; rows of a 16-bit type are interleaved in
    pairs, [n / 2, c, 2], as bf16 dot products read them."""
    rows = matrix.reshape(len(matrix), -1, 4 // dtype.itemsize, matrix.shape[2])
    return rows.transpose(2, 3).flatten(1).to(dtype)
