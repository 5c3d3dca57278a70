"""The factored Triton kernels, against materialised tensor products."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from polyrex.adapters.methods.tensor_product import FactoredSide, factor_leaves, tensor_factor
from polyrex.adapters.spec import Norm
from polyrex.kernels.gpu import factored as triton_factored
from polyrex.kernels.gpu.factored import factored_expand, factored_shrink
from polyrex.kernels.leaf_size import leaf_size
from support.cases import Popularity, relative_rms, task_of_token

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class FactoredCase:
    """Both sides of one module: of E experts for all tokens, or else of each token's task."""

    tokens: int
    d_in: int
    d_out: int
    rank: int
    order: int = 2
    norm: Norm = "layer"
    experts: int | None = None
    tasks: int = 1
    popularity: Popularity = "uniform"

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-{self.d_in}x{self.d_out}-r{self.rank}-N{self.order}-{self.norm}"
        sets = f"D{self.tasks}" if self.experts is None else f"E{self.experts}"
        return f"{sizes}-{sets}-{self.popularity}"


POPULARITIES: tuple[tuple[Popularity, int], ...] = (
    ("distinct", 2),
    ("skewed", 4),
    ("identical", 2),
)
CASES = (
    *(
        FactoredCase(tokens, 65, 129, 3, order, tasks=max(tokens, 1), popularity=popularity)
        for popularity, order in POPULARITIES
        for tokens in (1, 7)
    ),
    FactoredCase(33, 65, 129, 3, tasks=9, popularity="skewed"),
    FactoredCase(0, 65, 129, 3),
    FactoredCase(0, 65, 129, 3, experts=5),
    FactoredCase(7, 65, 129, 3, norm="none", tasks=4),
    FactoredCase(5, 50, 70, 5, order=3, norm="none", tasks=3),
    FactoredCase(9, 65, 129, 3, experts=5),
    FactoredCase(9, 65, 129, 3, order=4, experts=5),
    FactoredCase(3, 700, 300, 20, experts=9),  # several blocks of experts and of the grid's rows
    FactoredCase(3, 40, 30, 70, tasks=2),  # several blocks of ranks
    FactoredCase(4, 576, 1536, 16, experts=8),
)

pytestmark = pytest.mark.usefixtures("scratch_of_nans")


@dataclass(frozen=True)
class Inputs:
    """The arguments of both kernels, and the dense sides that the leaves stand for."""

    x: Tensor
    y: Tensor
    leaves: tuple[FactoredSide, FactoredSide]
    dense: tuple[Tensor, Tensor]  # [S, r, d_in], [S, r, d_out]
    rows: Tensor | None
    weights: Tensor | None

    def routed(self, dense: Tensor) -> Tensor:
        """The dense side of each token, [T, r, d]."""
        if self.weights is not None:
            return torch.einsum("te,erd->trd", self.weights.float(), dense)
        return dense if self.rows is None else dense[self.rows]


def inputs_on(device: torch.device, case: FactoredCase, dtype: torch.dtype) -> Inputs:
    """Random inputs, routed as the case says."""
    generator = torch.Generator().manual_seed(0)
    sets = case.experts or case.tasks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    leaves, dense = [], []
    for dimension, scale in ((case.d_in, case.d_in**-0.5), (case.d_out, 1 / case.rank)):
        drawn = normal(case.order, sets, case.rank, leaf_size(dimension, case.order)) + 0.3
        side = factor_leaves(drawn, case.norm)
        first = (side.first * scale).to(device, dtype)
        shift = None if side.shift is None else (side.shift * scale).to(device)
        leaves.append(FactoredSide(first, side.second.to(device, dtype), shift))
        dense.append((tensor_factor(drawn, dimension, case.norm) * scale).to(device))
    task = task_of_token(case.popularity, case.tokens, generator).clamp_max(case.tasks - 1)
    weights = None if case.experts is None else normal(case.tokens, sets).softmax(-1).to(device)
    return Inputs(
        normal(case.tokens, case.d_in).to(device, dtype),
        (normal(case.tokens, case.d_out) / 8).to(device, dtype),  # smaller than delta
        (leaves[0], leaves[1]),
        (dense[0], dense[1]),
        None if case.experts else task.to(device),
        weights,
    )


def adapted(inputs: Inputs) -> Tensor:
    """y + delta by the kernels, in a slice of a wider tensor."""
    side_a, side_b = inputs.leaves
    h = factored_shrink(inputs.x, *side_a, inputs.rows, inputs.weights)
    assert h.dtype == torch.float32
    packed = torch.nn.functional.pad(inputs.y, (3, 5), value=3.0)
    factored_expand(packed[:, 3:-5], h, *side_b, inputs.rows, inputs.weights)
    assert torch.equal(packed[:, :3], torch.full_like(packed[:, :3], 3))
    assert torch.equal(packed[:, -5:], torch.full_like(packed[:, -5:], 3))
    return packed[:, 3:-5]


def reference(inputs: Inputs) -> Tensor:
    """y + delta from the materialised sides, in float32."""
    a, b = (inputs.routed(dense) for dense in inputs.dense)
    h = torch.einsum("trd,td->tr", a, inputs.x.float())
    return inputs.y.float() + torch.einsum("tr,trd->td", h, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrink_and_expand_agree_with_the_twin(
    case: FactoredCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = inputs_on(device, case, dtype)
    assert relative_rms(adapted(inputs), reference(inputs)) <= TOLERANCE[dtype]


def test_many_tokens_take_whole_blocks_of_the_grid(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_factored, "PROGRAMS", 2)
    inputs = inputs_on(device, FactoredCase(2, 900, 5000, 3, tasks=2), torch.float32)
    assert relative_rms(adapted(inputs), reference(inputs)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("experts", [None, 5])
@pytest.mark.parametrize("wrong", ["scale dropped", "shift dropped", "another task's routing"])
def test_tolerance_tells_a_wrong_product(
    wrong: str, experts: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    case = FactoredCase(7, 65, 129, 3, experts=experts, tasks=7, popularity="distinct")
    inputs = inputs_on(device, case, dtype)
    a, b = inputs.leaves
    rows, weights = inputs.rows, inputs.weights
    changed = {
        "scale dropped": replace(inputs, leaves=(a, b._replace(first=b.first * 1.05))),
        "shift dropped": replace(inputs, leaves=(a._replace(shift=None), b)),
        "another task's routing": replace(
            inputs,
            rows=None if rows is None else rows.roll(1, 0),
            weights=None if weights is None else weights.roll(1, 0),
        ),
    }[wrong]
    assert relative_rms(adapted(changed), reference(inputs)) > 2 * TOLERANCE[dtype]


def test_shift_may_differ_by_row(device: torch.device) -> None:
    inputs = inputs_on(device, FactoredCase(3, 65, 129, 3, tasks=2), torch.float32)

    def by_row(side: FactoredSide) -> FactoredSide:
        assert side.shift is not None
        return side._replace(shift=side.shift.repeat_interleave(3, 1))

    a, b = inputs.leaves
    assert torch.equal(adapted(replace(inputs, leaves=(by_row(a), by_row(b)))), adapted(inputs))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_float32_leaves_serve_other_activations(dtype: torch.dtype, device: torch.device) -> None:
    # as TensorPoly-II makes them, once for each row of the routing table
    inputs = inputs_on(device, FactoredCase(7, 65, 129, 3, tasks=4), torch.float32)
    inputs = replace(inputs, x=inputs.x.to(dtype), y=inputs.y.to(dtype))
    assert relative_rms(adapted(inputs), reference(inputs)) <= TOLERANCE[dtype] / 2 + 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("experts", [None, 5])
def test_rows_of_zeros_change_nothing(
    experts: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = inputs_on(device, FactoredCase(5, 65, 129, 3, experts=experts, tasks=4), dtype)
    if inputs.weights is not None:
        inputs.weights[[0, 3]] = 0
    elif inputs.rows is not None:
        inputs.rows[[0, 3]] = 0
        inputs.rows[[1, 2, 4]] = torch.tensor([1, 2, 3], device=device)
        for leaf in inputs.leaves[1]:
            if leaf is not None:
                leaf[0] = 0
    changed = (adapted(inputs) != inputs.y).any(1)
    assert changed.tolist() == [False, True, True, False, True]
