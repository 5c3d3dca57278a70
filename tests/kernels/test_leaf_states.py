"""The states of tasks that mix leaves, derived for all modules of a kind at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.serving.layers import frozen_operands
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.factored import FactoredSides
from polyrex.kernels.leaf_states import ALIGNED, LeafStates, StateSide
from polyrex.kernels.modules import LeafModule
from polyrex.kernels.places import Place
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import StepPlan

SPECS = (
    AdapterSpec("tensorpoly-2", rank=3, experts=5),
    AdapterSpec("tensorpoly-2", rank=3, experts=5, order=4),
    AdapterSpec("tensorpoly-2", rank=3, experts=5, order=3, norm="none"),
)
TARGETS = ((20, 30), (20, 70), (20, 30))


def modules(spec: AdapterSpec) -> list[LeafModule]:
    """Three modules of two kinds."""
    found = []
    for index, (d_in, d_out) in enumerate(TARGETS):
        experts = make_experts(spec, TargetModule(str(index), d_in, d_out))
        generator = torch.Generator().manual_seed(index)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, generator=generator)

        def derive(operands: tuple[Tensor, ...], weights: Tensor) -> FactoredSides:
            state = experts.task_state(operands, weights)  # noqa: B023
            assert isinstance(state, FactoredSides)
            return state

        whole = slice(0, d_in), slice(0, d_out)
        operands = frozen_operands(experts, torch.float32)
        size = experts.table_size(spec)
        found.append(LeafModule(index, size, (d_in, d_out), operands, derive, *whole, 0))
    return found


def step_of(weights: Tensor, numbers: list[int], keys: list[object]) -> StepRouting:
    """A step of tasks, one for each row, in the places of these numbers and keys."""
    places = tuple(
        (row, Place(*place)) for row, place in enumerate(zip(numbers, keys, strict=True))
    )
    plan = StepPlan("own states", "", places=places)
    return StepRouting(weights, torch.arange(len(weights)), torch.float32, plan, by_slot=True)


def read(states: Tensor, side: StateSide) -> tuple[Tensor, Tensor, Tensor]:
    """First, second and shift of one side, from rows of the values."""
    flat = states[:, side.offset : side.offset + side.size].float()
    shape = len(flat), side.rank, -1
    first_size, second_size = side.rank * side.first, side.rank * side.second
    second_at = ALIGNED + first_size + -first_size % ALIGNED
    first = flat[:, ALIGNED : ALIGNED + first_size].reshape(shape)
    second = flat[:, second_at : second_at + second_size].reshape(shape)
    return first, second, flat[:, :1] + flat[:, 1:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"N{spec.order}-{spec.norm}")
def test_states_are_those_of_each_module_alone(spec: AdapterSpec, dtype: torch.dtype) -> None:
    states, all_modules = LeafStates(dtype), modules(spec)
    size = sum(states.add(module) for module in all_modules)
    weights = torch.rand(4, 3, all_modules[0].width)
    numbers = [3, 0, 1, 5]
    states.derive(step_of(weights, numbers, [0, 1, 2, 3]))
    assert states.values.shape[1] * states.values.itemsize == size
    assert states.values.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for module in all_modules:
        exact = module.derive(module.operands, weights[:, module.index])
        b = exact.b_first, exact.b_second, exact.b_shift
        expected = ((exact.a_first, exact.a_second, exact.a_shift), b)
        for side, (first, second, shift) in zip(states.sides(module), expected, strict=True):
            assert side.offset % ALIGNED == 0
            found = read(states.values[numbers], side)
            shift = torch.zeros(4, 1) if shift is None else shift
            for one, other in zip(found[:2], (first, second), strict=True):
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found[2], shift, rtol=1e-4, atol=1e-6)


def test_only_tasks_that_are_new_are_derived() -> None:
    states, all_modules = LeafStates(torch.float32), modules(SPECS[0])
    for module in all_modules:
        states.add(module)
    states.reserve(4)
    weights = torch.rand(2, 3, all_modules[0].width)
    with torch.inference_mode():  # as some engines, and the next step without
        states.derive(step_of(weights, [0, 1], ["a", "b"]))
    before, address = states.values.clone(), states.values.data_ptr()
    states.derive(step_of(weights.flip(0), [0, 1], ["a", "c"]))
    assert torch.equal(states.values[0], before[0])
    torch.testing.assert_close(states.values[1], before[0])
    assert states.values.data_ptr() == address
    assert states.generation == 1


def test_values_move_when_there_are_more_tasks_than_were_reserved() -> None:
    states, all_modules = LeafStates(torch.float32), modules(SPECS[0])
    for module in all_modules:
        states.add(module)
    weights = torch.rand(70, 3, all_modules[0].width)
    keys: list[object] = list(range(70))
    states.derive(step_of(weights[:2], [0, 1], keys[:2]))
    first = states.values.clone()
    states.derive(step_of(weights, list(range(70)), keys))
    assert states.generation == 2
    assert torch.equal(states.values[:2], first)
    assert states.values.count_nonzero(1).min() > 0


def test_a_plan_that_names_no_state_is_refused() -> None:
    states, all_modules = LeafStates(torch.float32), modules(SPECS[0])
    states.derive(step_of(torch.rand(1, 3, 10), [], []))  # there is no module
    states.add(all_modules[0])
    with pytest.raises(AssertionError, match="no task's state"):
        states.derive(StepRouting(torch.rand(1, 3, 10), torch.arange(1), torch.float32))
