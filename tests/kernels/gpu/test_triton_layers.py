"""Layers on the Triton kernels, of packed and of cut modules, against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.gpu.layers import (
    TritonFactoredLayer,
    TritonLeafLayer,
    TritonPairSpaceLayer,
    TritonRankSpaceLayer,
)
from polyrex.kernels.modules import LayerModule
from polyrex.kernels.rank_space import rank_space_reference
from polyrex.kernels.routing import StepRouting
from support.cases import RankSpaceCase, rank_space_inputs, relative_rms

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


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        (AdapterSpec("poly", rank=3, experts=5), TritonRankSpaceLayer),
        (AdapterSpec("trex", rank=3, rank_out=5, form="static"), TritonPairSpaceLayer),
        (AdapterSpec("tlora", rank=3), TritonFactoredLayer),
        (AdapterSpec("tensorpoly-1", rank=3, experts=5, order=4), TritonFactoredLayer),
        (AdapterSpec("tensorpoly-2", rank=3, experts=5), TritonLeafLayer),
    ],
    ids=lambda value: getattr(value, "method", ""),
)
def test_layers_that_an_engine_serves_on_a_gpu(
    spec: AdapterSpec, layer: type, dtype: torch.dtype, device: torch.device
) -> None:
    """Two packed modules, with tokens of three tasks and of the base model."""
    torch.manual_seed(0)
    columns = {0: slice(2, 31), 1: slice(31, 71)}
    experts = {
        i: make_experts(spec, TargetModule(str(i), 20, c.stop - c.start)).to(device)
        for i, c in columns.items()
    }
    for parameter in (p for own in experts.values() for p in own.parameters()):
        torch.nn.init.normal_(parameter, std=0.7)
    slices = [replace(Slice.whole(i, own), columns=columns[i]) for i, own in experts.items()]
    served = LayerBuilder(dtype, torch.device("cuda"), 0).build(slices)
    assert type(served) is layer
    weights = experts[0].route(spec, torch.randn(4, 2, experts[0].routing_size(spec))).to(device)
    weights[1] = 0  # the base model
    for rows in ([0, 2, 2, 1, 3], [1, 3, 0]):
        step = StepRouting(weights.clone(), torch.tensor(rows, device=device), dtype)
        x = torch.randn(len(rows), 20).to(device, dtype)
        y = torch.zeros(len(rows), 72, dtype=dtype, device=device)
        served.add_(y, x, step)
        exact = replace(step, dtype=torch.float32)
        for i, own in experts.items():
            delta = own.delta(own.operands(torch.float32), x.float(), exact.module(i))
            assert relative_rms(y[:, columns[i]], delta.detach()) <= TOLERANCE[dtype]
        assert (y == 0).all(1).tolist() == [row == 1 for row in rows]
        assert not y[:, :2].any()
