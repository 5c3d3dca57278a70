"""The product of the shared path, against its slow twin."""

from __future__ import annotations

import pytest
import torch

from polyrex.kernels.rank_space import rank_space, rank_space_reference
from support.cases import RANK_SPACE_CASES, RankSpaceCase, rank_space_inputs, relative_rms

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", RANK_SPACE_CASES, ids=str)
def test_product_agrees_with_its_twin(case: RankSpaceCase, dtype: torch.dtype) -> None:
    inputs = rank_space_inputs(case, dtype)
    found = rank_space(*inputs)
    assert found.dtype == dtype
    assert found.shape == (case.tokens, case.d_out)
    assert relative_rms(found, rank_space_reference(*inputs)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("wrong", ["experts swapped", "scale dropped", "another task's weights"])
def test_tolerance_tells_a_wrong_product(wrong: str, dtype: torch.dtype) -> None:
    case = RankSpaceCase(7, 65, 129, 5, 3, popularity="distinct")
    x, a, b, weights = inputs = rank_space_inputs(case, dtype)
    changed = {
        "experts swapped": (x, a, b, weights[..., [1, 0, 2, 3, 4]]),
        "scale dropped": (x, a, b * 1.05, weights),
        "another task's weights": (x, a, b, weights.roll(1, 0)),
    }[wrong]
    error = relative_rms(rank_space(*changed), rank_space_reference(*inputs))
    assert error > 2 * TOLERANCE[dtype]


def test_twin_is_the_formula_written_out() -> None:
    x, a, b, weights = rank_space_inputs(RankSpaceCase(2, 6, 4, 2, 3, splits=2), torch.float32)
    t, out = 1, torch.zeros(4)
    hidden = torch.zeros(3)
    for s in range(2):
        for e in range(2):
            hidden += weights[t, s, e] * (a[s, 3 * e : 3 * e + 3] @ x[t, 3 * s : 3 * s + 3])
    for s in range(2):
        for e in range(2):
            out[2 * s : 2 * s + 2] += weights[t, s, e] * (hidden @ b[s, 3 * e : 3 * e + 3])
    torch.testing.assert_close(rank_space_reference(x, a, b, weights)[t], out)


@pytest.mark.parametrize("splits", [1, 3])
def test_row_of_zeros_gives_exactly_nothing(splits: int) -> None:
    x, a, b, weights = rank_space_inputs(RankSpaceCase(5, 9, 6, 3, 2, splits), torch.bfloat16)
    weights[2] = 0
    assert torch.equal(rank_space(x, a, b, weights)[2], torch.zeros(6, dtype=torch.bfloat16))
