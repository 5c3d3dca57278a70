"""The Triton kernels of the shared path, against the slow twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyrex.kernels.gpu.rank_space import routed_expand, routed_shrink
from polyrex.kernels.rank_space import rank_space_reference
from support.cases import RANK_SPACE_CASES, RankSpaceCase, rank_space_inputs, relative_rms

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}

CASES = (
    *(case for case in RANK_SPACE_CASES if case.splits == 1),
    RankSpaceCase(3, 1000, 70, 9, 20, popularity="distinct"),  # several blocks of K and of experts
    RankSpaceCase(70, 130, 140, 3, 70, popularity="skewed"),  # several blocks of T and of ranks
    RankSpaceCase(2, 33, 300, 1, 130),
)

pytestmark = pytest.mark.usefixtures("scratch_of_nans")


def adapted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """y + delta by the kernels, in a slice of a wider tensor, like a packed projection's output."""
    tokens, d_out = y.shape
    packed = y.new_full((tokens, d_out + 8), 3)
    packed[:, 3:-5] = y
    h = routed_shrink(x, a[0], weights)
    assert h.dtype == torch.float32
    routed_expand(packed[:, 3:-5], h[:, 0], b[0], weights[:, 0])
    assert torch.equal(packed[:, :3], torch.full_like(packed[:, :3], 3))
    assert torch.equal(packed[:, -5:], torch.full_like(packed[:, -5:], 3))
    return packed[:, 3:-5]


def inputs_on(
    device: torch.device, case: RankSpaceCase, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The output that is added to, and the arguments of `rank_space`."""
    x, a, b, weights = (tensor.to(device) for tensor in rank_space_inputs(case, dtype))
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(case.tokens, case.d_out, generator=generator) / 8  # smaller than delta
    return y.to(device, dtype), (x, a, b, weights)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrink_and_expand_agree_with_the_twin(
    case: RankSpaceCase, dtype: torch.dtype, device: torch.device
) -> None:
    y, inputs = inputs_on(device, case, dtype)
    expected = y.float() + rank_space_reference(*inputs)
    assert relative_rms(adapted(y, *inputs), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wrong", ["experts swapped", "scale dropped", "another task's weights"])
def test_tolerance_tells_a_wrong_product(
    wrong: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = RankSpaceCase(7, 65, 129, 5, 3, popularity="distinct")
    y, inputs = inputs_on(device, case, dtype)
    x, a, b, weights = inputs
    changed = {
        "experts swapped": (x, a, b, weights[..., [1, 0, 2, 3, 4]]),
        "scale dropped": (x, a, b * 1.05, weights),
        "another task's weights": (x, a, b, weights.roll(1, 0)),
    }[wrong]
    error = relative_rms(adapted(y, *changed), y.float() + rank_space_reference(*inputs))
    assert error > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_modules_that_share_an_input_each_have_their_routing(
    dtype: torch.dtype, device: torch.device
) -> None:
    tokens, modules, experts, rank, d_in = 5, 3, 4, 6, 300
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d_in + 7, generator=generator).to(device, dtype)[:, :d_in]
    a = torch.randn(modules, experts, rank, d_in, generator=generator).to(device, dtype)
    weights = torch.rand(tokens, modules, experts, generator=generator).to(device)
    h = routed_shrink(x, a.flatten(0, 2), weights)
    expected = torch.einsum("tne,nekd,td->tnk", weights, a.float(), x.float())
    assert relative_rms(h, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_zeros_change_nothing(dtype: torch.dtype, device: torch.device) -> None:
    y, (x, a, b, weights) = inputs_on(device, RankSpaceCase(5, 70, 66, 3, 2), dtype)
    weights[[0, 3]] = 0
    found = adapted(y, x, a, b, weights)
    changed = (found != y).any(1)
    assert changed.tolist() == [False, True, True, False, True]
