"""Clipping, and a state that moves between devices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from polyrex.adapters.methods.protocol import LearningRates
from polyrex.training.loop.optimiser import Optimiser, clip
from polyrex.training.model.multi_task import Groups
from support.card_operators import CUDA, CardTensor
from support.placement import Card


def drawn(seed: int, device: torch.device | str = "cpu") -> list[nn.Parameter]:
    """Parameters of several shapes with gradients; the last has none."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (7,), (), (2, 2))
    found = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for parameter in found[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    return found


def norms(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_that_of_torch(most: float) -> None:
    """To the bit. The wrong case: each gradient clipped by its own norm."""
    found, expected, wrong = drawn(0), drawn(0), drawn(0)
    clip(found, most)
    nn.utils.clip_grad_norm_(expected, most)
    assert all(torch.equal(*pair) for pair in zip(norms(found), norms(expected), strict=True))
    for parameter in wrong:
        nn.utils.clip_grad_norm_([parameter], most)
    same = [torch.equal(*pair) for pair in zip(norms(wrong), norms(expected), strict=True)]
    assert all(same) == (most > 10)


def test_nothing_to_clip_is_no_error() -> None:
    untouched = nn.Parameter(torch.ones(2))
    clip([untouched], 1.0)
    clip([], 1.0)
    assert untouched.grad is None
    assert untouched.tolist() == [1, 1]


def groups(parameters: list[nn.Parameter]) -> Groups:
    return {"experts": [(f"p{n}", each) for n, each in enumerate(parameters[:-1])]}


@pytest.mark.parametrize("to_card", [True, False], ids=["to the card", "to the CPU"])
def test_state_goes_on_on_another_device(*, to_card: bool) -> None:
    """Two steps on one device, and one on the other: the same as three on the CPU."""
    with Card():
        places: list[torch.device | str] = ["cpu", CUDA] if to_card else [CUDA, "cpu"]
        first, second, whole = drawn(0, places[0]), drawn(1, places[1]), drawn(0)
        before, after, alone = (
            Optimiser(groups(each), LearningRates()) for each in (first, second, whole)
        )
        for step in range(3):
            for parameters, optimiser in ((first, before), (whole, alone)):
                for parameter, fresh in zip(parameters, drawn(step), strict=True):
                    grad = fresh.grad
                    parameter.grad = None if grad is None else grad.to(parameter.device)
                if step < 2 or optimiser is alone:
                    optimiser.step(0.5)
        state = before.state()
        assert not any(isinstance(tensor, CardTensor) for tensor in state.values())
        after.load(state)
        for parameter, fresh in zip(second, drawn(2), strict=True):
            parameter.grad = None if fresh.grad is None else fresh.grad.to(parameter.device)
        after.step(0.5)
        for one, other in zip(second[:-1], whole[:-1], strict=True):
            torch.testing.assert_close(one.detach().cpu(), other.detach())
