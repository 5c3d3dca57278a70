"""The Triton kernel of static T-REX, against its formula written out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from polyrex.kernels.gpu.pair_space import pair_shrink
from polyrex.kernels.gpu.rank_space import OutputSides, TableRows, routed_expand
from polyrex.kernels.modules import Hidden
from support.cases import Popularity, relative_rms, task_of_token

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class PairCase:
    """T tokens, I and J rank-one experts."""

    tokens: int
    d_in: int
    side_a: int
    side_b: int
    popularity: Popularity = "uniform"

    def __str__(self) -> str:
        return f"T{self.tokens}-{self.d_in}-I{self.side_a}-J{self.side_b}-{self.popularity}"


CASES = (
    *(
        PairCase(tokens, 65, 5, 3, popularity)
        for popularity in ("distinct", "skewed", "identical")
        for tokens in (1, 7, 33)
    ),
    PairCase(0, 65, 5, 3),
    PairCase(32, 576, 16, 16, "distinct"),
    PairCase(3, 1000, 70, 9, "distinct"),  # several blocks of K and of I
    PairCase(70, 90, 20, 37),  # several blocks of T and of J
    PairCase(5, 90, 9, 200),
)

pytestmark = pytest.mark.usefixtures("scratch_of_nans")


def inputs_on(
    device: torch.device, case: PairCase, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, A, and the G of each token."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.d_in, generator=generator)
    a = torch.randn(case.side_a, case.d_in, generator=generator) / case.d_in**0.5
    tasks = torch.randn(max(case.tokens, 1), case.side_a, case.side_b, generator=generator)
    pairs = tasks[task_of_token(case.popularity, case.tokens, generator)]
    return x.to(device, dtype), a.to(device, dtype), pairs.to(device, dtype)


def reference(x: Tensor, a: Tensor, pairs: Tensor) -> Tensor:
    """G^T (A x), one token at a time, in float32."""
    out = x.new_empty(len(x), pairs.shape[-1], dtype=torch.float32)
    for t in range(len(x)):
        hidden = a.float() @ x[t].float()
        out[t] = pairs[t].float().T @ hidden
    return out


def shrunk(x: Tensor, a: Tensor, pairs: Tensor) -> Hidden:
    """What `pair_shrink` makes of the second of a table's two modules."""
    table = pairs.flip(0).flatten(1).unsqueeze(1)
    table = torch.cat((torch.full_like(table, 7), table), 1)
    rows = torch.arange(len(x) - 1, -1, -1, device=x.device)
    routing = TableRows(table, rows, torch.tensor([1], device=x.device))
    return pair_shrink(x, a, routing, pairs.shape[2])


def hidden_of(x: Tensor, a: Tensor, pairs: Tensor) -> Tensor:
    """h [T, J]: the sum of the parts."""
    return shrunk(x, a, pairs).parts.sum(1)[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrink_agrees_with_its_twin(
    case: PairCase, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = inputs_on(device, case, dtype)
    found = hidden_of(*inputs)
    assert found.dtype == torch.float32
    assert found.shape == (case.tokens, case.side_b)
    assert relative_rms(found, reference(*inputs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wrong", ["sides swapped", "scale dropped", "another task's gates"])
def test_tolerance_tells_a_wrong_product(
    wrong: str, dtype: torch.dtype, device: torch.device
) -> None:
    x, a, pairs = inputs = inputs_on(device, PairCase(7, 65, 5, 5, "distinct"), dtype)
    changed = {
        "sides swapped": (x, a, pairs.mT.contiguous()),
        "scale dropped": (x, a * 1.05, pairs),
        "another task's gates": (x, a, pairs.roll(1, 0)),
    }[wrong]
    assert relative_rms(hidden_of(*changed), reference(*inputs)) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_shrink_and_dense_expand_make_the_static_form(
    dtype: torch.dtype, device: torch.device
) -> None:
    x, a, pairs = inputs_on(device, PairCase(7, 65, 6, 5, "distinct"), dtype)
    pairs[[0, 4]] = 0
    generator = torch.Generator().manual_seed(1)
    b = torch.randn(5, 33, generator=generator).to(device, dtype)
    before = torch.randn(7, 33, generator=generator).to(device, dtype)
    y = before.clone()
    routed_expand(y, shrunk(x, a, pairs), OutputSides.of([(0, b)]))
    expected = before.float() + reference(x, a, pairs) @ b.float()
    assert relative_rms(y, expected) <= TOLERANCE[dtype]
    assert torch.equal((y == before).all(1).nonzero().flatten().cpu(), torch.tensor([0, 4]))
