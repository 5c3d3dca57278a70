"""Layers on the Triton kernels against the formula, packed and cut."""

from __future__ import annotations

import pytest
import torch

from polyrex.kernels.cases import RankSpaceCase, rank_space_inputs, relative_rms
from polyrex.kernels.rank_space import rank_space_reference
from polyrex.kernels.rank_space_layer import LayerModule
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.triton_layers import TritonPairSpaceLayer, TritonRankSpaceLayer

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rank_space_layer_of_packed_and_cut_modules(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, a, b, weights = (
        t.to(device) for t in rank_space_inputs(RankSpaceCase(7, 40, 24, 3, 5), dtype)
    )
    whole = LayerModule(1, a, b, slice(0, 40), slice(0, 24), 3)
    half = LayerModule(0, a, b, slice(0, 40), slice(8, 24), 30)
    table = torch.stack([weights[:, 0].flip(0), weights[:, 0]], 1).float()
    step = StepRouting(table, torch.arange(7, device=device), dtype)
    y = torch.zeros(7, 50, dtype=dtype, device=device)
    TritonRankSpaceLayer([whole, half]).add_(y, x, step)
    expected = torch.zeros(7, 50, device=device)
    expected[:, 3:27] = rank_space_reference(x, a, b, weights)
    expected[:, 30:46] = rank_space_reference(x, a, b, weights.flip(0))[:, 8:]
    assert relative_rms(y, expected) <= TOLERANCE[dtype]
    assert relative_rms(y.roll(1, 0), expected) > 2 * TOLERANCE[dtype]  # another token's adapter


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_pair_space_layer(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, a, b, pairs = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size in ((6, 20), (1, 3, 20), (1, 5, 18), (6, 1, 15))
    )
    module = LayerModule(0, a, b, slice(0, 20), slice(0, 18), 0)
    step = StepRouting(pairs.float(), torch.arange(6, device=device), dtype)
    y = torch.zeros(6, 18, dtype=dtype, device=device)
    TritonPairSpaceLayer([module]).add_(y, x, step)
    hidden = torch.einsum(
        "td,id,tij->tj", x.float(), a[0].float(), pairs[:, 0].view(6, 3, 5).float()
    )
    assert relative_rms(y, hidden @ b[0].float()) <= TOLERANCE[dtype]
