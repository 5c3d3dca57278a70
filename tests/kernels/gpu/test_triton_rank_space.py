"""The Triton kernels of the shared path, against the slow twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyrex.kernels.gpu.rank_space import OutputSides, TableRows, routed_expand, routed_shrink
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


def routing(weights: Tensor) -> TableRows:
    """A table [L, M, E] and rows with which tokens read `weights` [T, n, E], its modules last."""
    table = torch.nn.functional.pad(weights.flip(0), (0, 0, 2, 0), value=7)  # two other modules
    rows = torch.arange(len(weights) - 1, -1, -1, device=weights.device)
    indices = torch.arange(2, table.shape[1], device=weights.device)
    return TableRows(table.contiguous(), rows, indices)


def adapted(y: Tensor, x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """y + delta by the kernels, in a slice of a wider tensor, like a packed projection's output."""
    tokens, d_out = y.shape
    packed = y.new_full((tokens, d_out + 8), 3)
    packed[:, 3:-5] = y
    hidden = routed_shrink(x, a[0], routing(weights))
    routed_expand(packed, hidden, OutputSides.of([(3, b[0])]))
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
@pytest.mark.parametrize(("tokens", "experts"), [(5, 4), (70, 4), (70, 1), (700, 1)])
def test_packed_modules_each_have_their_routing_and_their_columns(
    tokens: int, experts: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Three modules in one launch each way; the second begins in the middle of a block."""
    rank, d_in, widths, columns = 6, 300, (140, 3, 30), (0, 141, 150)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x = normal(tokens, d_in + 7)[:, :d_in]
    a, sides = normal(3, experts, rank, d_in), [normal(experts, rank, width) for width in widths]
    weights = torch.rand(tokens, 3, experts, generator=generator).to(device)
    y, expected = torch.ones(2, tokens, 181, device=device).to(dtype)
    b = OutputSides.of([(c, side.flatten(0, 1)) for c, side in zip(columns, sides, strict=True)])
    routed_expand(y, routed_shrink(x, a.flatten(0, 2), routing(weights)), b)
    hidden = torch.einsum("tne,nekd,td->tnk", weights, a.float(), x.float())
    expected = expected.float()
    for n, (side, column, width) in enumerate(zip(sides, columns, widths, strict=True)):
        delta = torch.einsum("te,tk,eko->to", weights[:, n], hidden[:, n], side.float())
        expected[:, column : column + width] += delta
    assert relative_rms(y, expected) <= TOLERANCE[dtype]
    assert torch.equal(y[:, 140], torch.ones_like(y[:, 140]))  # between two modules
    assert relative_rms(y[:, 150:180], expected[:, 141:171]) > 2 * TOLERANCE[dtype]


def test_results_are_the_same_in_every_run(device: torch.device) -> None:
    """To the last bit: no sum depends on which program comes first."""
    case = RankSpaceCase(3, 1000, 70, 9, 20, popularity="distinct")
    y, inputs = inputs_on(device, case, torch.float32)
    first = adapted(y, *inputs)
    assert all(torch.equal(adapted(y, *inputs), first) for _ in range(3))


def test_routing_of_too_few_tokens_is_refused(device: torch.device) -> None:
    _, (x, a, _, weights) = inputs_on(device, RankSpaceCase(5, 70, 66, 3, 2), torch.float32)
    with pytest.raises(AssertionError, match="expected routing for 5 tokens, got it for 4"):
        routed_shrink(x, a[0], routing(weights[:4]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_of_zeros_change_nothing(dtype: torch.dtype, device: torch.device) -> None:
    y, (x, a, b, weights) = inputs_on(device, RankSpaceCase(5, 70, 66, 3, 2), dtype)
    weights[[0, 3]] = 0
    found = adapted(y, x, a, b, weights)
    changed = (found != y).any(1)
    assert changed.tolist() == [False, True, True, False, True]
