"""The factored Triton kernels, against materialised tensor products."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from polyrex.adapters.methods.tensor_product import FactoredSide, factor_leaves, tensor_factor
from polyrex.adapters.spec import Norm
from polyrex.kernels.factored import FactoredSides
from polyrex.kernels.gpu import factored as triton_factored
from polyrex.kernels.gpu.factored import LeafSide, factored_expand, factored_shrink
from polyrex.kernels.leaf_size import leaf_size
from polyrex.kernels.leaf_states import LeafStates
from polyrex.kernels.modules import LeafModule
from polyrex.kernels.places import Place
from polyrex.kernels.routing import StepRouting
from polyrex.kernels.step_plan import StepPlan
from support.cases import Popularity, relative_rms, task_of_token

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class FactoredCase:
    """Both sides of one module, of each token's task, and the parts of its dimensions here."""

    tokens: int
    d_in: int
    d_out: int
    rank: int
    order: int = 2
    norm: Norm = "layer"
    tasks: int = 1
    popularity: Popularity = "uniform"
    inputs: tuple[int, int] | None = None
    outputs: tuple[int, int] | None = None

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-{self.d_in}x{self.d_out}-r{self.rank}-N{self.order}-{self.norm}"
        return f"{sizes}-D{self.tasks}-{self.popularity}-{self.inputs}-{self.outputs}"


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
    FactoredCase(7, 65, 129, 3, norm="none", tasks=4),
    FactoredCase(5, 50, 70, 5, order=3, norm="none", tasks=3),
    FactoredCase(3, 700, 300, 20, tasks=2),  # several blocks of the grid's rows
    FactoredCase(3, 40, 30, 70, tasks=2),  # several blocks of ranks
    FactoredCase(4, 576, 1536, 16, tasks=3),
    FactoredCase(5, 65, 129, 3, tasks=4, inputs=(30, 65), outputs=(0, 43)),
    FactoredCase(5, 900, 700, 3, tasks=4, inputs=(450, 900), outputs=(350, 700)),
)

pytestmark = pytest.mark.usefixtures("scratch_of_nans")


@dataclass(frozen=True)
class Inputs:
    """The arguments of both kernels, and the dense sides that the leaves stand for."""

    x: Tensor
    y: Tensor
    leaves: tuple[FactoredSide, FactoredSide]  # [D, r, .]
    dense: tuple[Tensor, Tensor]  # [D, r, d_in], [D, r, d_out], what is here of them
    parts: tuple[slice, slice]  # of d_in and d_out that are here
    places: Tensor


def inputs_on(device: torch.device, case: FactoredCase, dtype: torch.dtype) -> Inputs:
    """Random inputs, routed as the case says."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts = slice(*(case.inputs or (0, case.d_in))), slice(*(case.outputs or (0, case.d_out)))
    leaves, dense = [], []
    scales = (case.d_in**-0.5, 1 / case.rank)
    for dimension, scale, part in zip((case.d_in, case.d_out), scales, parts, strict=True):
        drawn = normal(case.order, case.tasks, case.rank, leaf_size(dimension, case.order)) + 0.3
        side = factor_leaves(drawn, case.norm)
        shift = None if side.shift is None else (side.shift * scale).to(device)
        first, second = (side.first * scale).to(device), side.second.to(device)
        leaves.append(FactoredSide(first, second, shift))
        factor = (tensor_factor(drawn, dimension, case.norm) * scale).to(device)
        dense.append(factor[..., part])
    task = task_of_token(case.popularity, case.tokens, generator).clamp_max(case.tasks - 1)
    width_in, width_out = (part.stop - part.start for part in parts)
    return Inputs(
        normal(case.tokens, width_in).to(device, dtype),
        (normal(case.tokens, width_out) / 8).to(device, dtype),  # smaller than delta
        (leaves[0], leaves[1]),
        (dense[0], dense[1]),
        parts,
        task.to(device),
    )


def states_of(inputs: Inputs) -> tuple[LeafStates, LeafModule]:
    """The states of all tasks, each in the place of its number; beside another module's."""

    def derive(operands: tuple[Tensor, ...], weights: Tensor) -> FactoredSides:
        mixed = [torch.einsum("dw,w...->d...", weights, each) for each in operands]
        if len(mixed) == 4:
            return FactoredSides(mixed[0], mixed[1], None, mixed[2], mixed[3], None)
        return FactoredSides(*mixed)

    operands = tuple(each for side in inputs.leaves for each in side if each is not None)
    tasks, device = len(operands[0]), inputs.x.device
    module = LeafModule(1, tasks, "kind", operands, derive, *inputs.parts, 3)
    states = LeafStates(inputs.x.dtype)
    states.add(replace(module, index=0, operands=tuple(each + 7 for each in operands)))
    states.add(module)
    plan = StepPlan("own states", "", places=tuple((t, Place(t, t)) for t in range(tasks)))
    weights = torch.eye(tasks, device=device).unsqueeze(1).expand(-1, 2, -1)
    states.derive(StepRouting(weights, inputs.places, inputs.x.dtype, plan, by_slot=True))
    return states, module


def adapted(inputs: Inputs) -> Tensor:
    """y + delta by the kernels, in a slice of a wider tensor."""
    states, module = states_of(inputs)
    values, places = states.values, inputs.places
    side_a, side_b = states.sides(module)
    hidden = factored_shrink(inputs.x, values, places, [LeafSide.of(side_a, module.inputs)])
    assert hidden.parts.dtype == torch.float32
    packed = torch.nn.functional.pad(inputs.y, (3, 5), value=3.0)
    sides = [LeafSide.of(side_b, module.outputs)]
    factored_expand(packed, hidden, values, places, sides, (3,))
    assert torch.equal(packed[:, :3], torch.full_like(packed[:, :3], 3))
    assert torch.equal(packed[:, -5:], torch.full_like(packed[:, -5:], 3))
    return packed[:, 3:-5]


def reference(inputs: Inputs) -> Tensor:
    """y + delta from the materialised sides, in float32."""
    a, b = (dense[inputs.places] for dense in inputs.dense)
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
@pytest.mark.parametrize("wrong", ["scale dropped", "shift dropped", "another task's state"])
def test_tolerance_tells_a_wrong_product(
    wrong: str, dtype: torch.dtype, device: torch.device
) -> None:
    case = FactoredCase(7, 65, 129, 3, tasks=7, popularity="distinct")
    inputs = inputs_on(device, case, dtype)
    a, b = inputs.leaves
    assert a.shift is not None
    changed = {
        "scale dropped": replace(inputs, leaves=(a, b._replace(first=b.first * 1.05))),
        "shift dropped": replace(inputs, leaves=(a._replace(shift=a.shift * 0), b)),
        "another task's state": replace(inputs, places=inputs.places.roll(1, 0)),
    }[wrong]
    assert relative_rms(adapted(changed), reference(inputs)) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tokens_of_the_base_model_change_nothing(dtype: torch.dtype, device: torch.device) -> None:
    inputs = inputs_on(device, FactoredCase(5, 65, 129, 3, tasks=4), dtype)
    inputs.places[[0, 3]] = -1
    changed = (adapted(inputs) != inputs.y).any(1)
    assert changed.tolist() == [False, True, True, False, True]
