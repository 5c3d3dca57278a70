"""Layers on the Triton kernels, of packed and of cut modules, against the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from polyrex.adapters.methods.protocol import Experts
from polyrex.adapters.methods.registry import make_experts
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice, StepContext
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels import routing
from polyrex.kernels.gpu.layers import (
    TritonLayer,
    TritonLeafLayer,
    TritonPairSpaceLayer,
    TritonRankSpaceLayer,
)
from polyrex.kernels.routing import RoutingTable
from support.cases import relative_rms

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
SPECS = (
    AdapterSpec("lora", rank=3),
    AdapterSpec("poly", rank=3, experts=5),
    AdapterSpec("mhr", rank=3, experts=5, splits=1),
    AdapterSpec("trex", rank=3, rank_out=5, form="static"),
    AdapterSpec("tlora", rank=3),
    AdapterSpec("tensorpoly-1", rank=3, experts=5, order=4),
    AdapterSpec("tensorpoly-2", rank=3, experts=5),
    AdapterSpec("tensorpoly-2", rank=3, experts=5, order=4),
)
LAYERS = {"trex": TritonPairSpaceLayer, "tensorpoly-2": TritonLeafLayer}
D_IN = 20
COLUMNS = (slice(2, 31), slice(31, 71), slice(71, 100))
MAX_TOKENS = 16

pytestmark = pytest.mark.usefixtures("scratch_of_nans", "by_slot")


@pytest.fixture
def by_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tables be read as on a GPU, wherever they are."""
    monkeypatch.setattr(routing, "reads_by_slot", lambda _device: True)


class Served:
    """A layer of three packed modules, as an engine has it: of two shapes, in a table of four."""

    def __init__(self, spec: AdapterSpec, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dtype, self.device = dtype, device
        self.experts: list[Experts] = []
        for i, columns in enumerate(COLUMNS):
            own = make_experts(spec, TargetModule(str(i), D_IN, columns.stop - columns.start))
            for parameter in own.parameters():
                torch.nn.init.normal_(parameter, std=0.7, generator=generator)
            self.experts.append(own.to(device))
        self.context = StepContext()
        self.builder = LayerBuilder(dtype, torch.device("cuda"), 1 << 16, self.context)
        self.slices = [
            replace(Slice.whole(i + 1, own), columns=columns)
            for i, (own, columns) in enumerate(zip(self.experts, COLUMNS, strict=True))
        ]

    def build(self, slices: Sequence[Slice]) -> TritonLayer:
        layer = self.builder.build(slices)
        assert isinstance(layer, TritonLayer)
        return layer

    def table(self) -> RoutingTable:
        """Three tasks in the slots 1 to 3."""
        experts = self.experts[0]
        planner = self.builder.planner(experts)
        size = experts.table_size(experts.spec)
        table = RoutingTable(4, 4, size, self.device, planner=planner, max_tokens=MAX_TOKENS)
        for slot in (1, 2, 3):
            table.write(slot, self.routes(slot))
        return table

    def routes(self, seed: int) -> Tensor:
        """A task's row of the table."""
        experts = self.experts[0]
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(4, experts.routing_size(experts.spec), generator=generator)
        return experts.route(experts.spec, logits)

    def delta(self, number: int, x: Tensor, weights: Tensor) -> Tensor:
        """The method's own delta of one module in float32, from each token's row [T, M, W]."""
        experts = self.experts[number]
        step = routing.StepRouting(weights, torch.arange(len(x), device=self.device), torch.float32)
        exact = step.module(number + 1)
        return experts.delta(experts.operands(torch.float32), x.float(), exact).detach()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method}-{spec.order}")
def test_packed_modules_of_an_engines_layer(
    spec: AdapterSpec, dtype: torch.dtype, device: torch.device
) -> None:
    served = Served(spec, dtype, device)
    layer = served.build(served.slices)
    assert type(layer) is LAYERS.get(spec.method, TritonRankSpaceLayer)
    table = served.table()
    for slots in ([2, 1, 1, 0, 3], [0, 3, 2], [3] * MAX_TOKENS):
        step = table.step(slots, dtype)
        served.context.set(step)
        assert step is not None
        x = torch.randn(len(slots), D_IN).to(device, dtype)
        y = torch.ones(len(slots), 101, dtype=dtype, device=device)
        layer.add_(y, x, step)
        deltas = [served.delta(n, x, table.weights[slots]) for n in range(3)]
        expected = torch.cat(deltas, 1) + 1
        assert relative_rms(y[:, 2:100], expected) <= TOLERANCE[dtype]
        assert (y == 1).all(1).tolist() == [slot == 0 for slot in slots]
        assert (y[:, [0, 1, 100]] == 1).all()
        if len(set(slots)) > 1:
            assert relative_rms(y[:, 2:100].roll(1, 0), expected) > 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method}-{spec.order}")
@pytest.mark.parametrize("dim", ["inputs", "outputs"])
def test_ranks_of_cut_modules_add_up(dim: str, spec: AdapterSpec, device: torch.device) -> None:
    """What tensor parallelism does; outputs are cut in every module of the layer."""
    served = Served(spec, torch.float32, device)
    layers = []
    for rank in (0, 1):
        begin, cut = 0, []
        for part in served.slices:
            size = part.experts.target.d_in if dim == "inputs" else part.outputs.stop
            here = slice(0, size // 3) if rank == 0 else slice(size // 3, size)
            if dim == "inputs":
                cut.append(replace(part, inputs=here))
            else:
                columns = slice(begin, begin + here.stop - here.start)
                cut.append(replace(part, outputs=here, columns=columns))
                begin = columns.stop
        layers.append((served.build(cut), cut))
    table = served.table()
    slots = [2, 1, 1, 0, 3]
    step = table.step(slots, torch.float32)
    served.context.set(step)
    assert step is not None
    x = torch.randn(len(slots), D_IN).to(device)
    found = [torch.zeros(len(x), columns.stop - columns.start).to(device) for columns in COLUMNS]
    for layer, cut in layers:
        y = torch.zeros(len(x), 100, device=device)
        layer.add_(y, x[:, cut[0].inputs] if dim == "inputs" else x, step)
        for n, part in enumerate(cut):
            found[n][:, part.outputs] += y[:, part.columns]
    for n, sums in enumerate(found):
        expected = served.delta(n, x, table.weights[slots])
        assert relative_rms(sums, expected) <= TOLERANCE[torch.float32]


def test_states_stay_where_they_are_and_are_derived_anew_for_another_task(
    device: torch.device,
) -> None:
    served = Served(AdapterSpec("tensorpoly-2", rank=3, experts=5), torch.float32, device)
    layer, table = served.build(served.slices), served.table()
    x = torch.randn(2, D_IN).to(device)
    addresses = set()
    for seed in (7, 8, 7):
        table.write(1, served.routes(seed))
        step = table.step([1, 2], torch.float32)
        served.context.set(step)
        assert step is not None
        assert served.context.states is not None
        values = served.context.states.values
        addresses.add((values.data_ptr(), step.rows.data_ptr(), step.places.data_ptr()))
        y = torch.zeros(2, 100, device=device)
        layer.add_(y, x, step)
        expected = served.delta(1, x, table.weights[[1, 2]])
        assert relative_rms(y[:, COLUMNS[1]], expected) <= TOLERANCE[torch.float32]
    assert len(addresses) == 1
    assert served.context.generation == 1


def test_a_step_that_is_kept_reads_what_is_in_the_buffers(device: torch.device) -> None:
    """As a CUDA graph does: the step of the capture, replayed for other tasks."""
    for spec in SPECS:
        served = Served(spec, torch.float32, device)
        layer, table = served.build(served.slices), served.table()
        captured = table.step([1, 2, 3], torch.float32)
        assert captured is not None
        served.context.set(captured)
        x = torch.randn(3, D_IN).to(device)
        for slots in ([3, 3, 1], [2, 0, 0], [0, 0, 0]):
            served.context.set(table.step(slots, torch.float32))
            y = torch.zeros(3, 101, device=device)
            layer.add_(y, x, captured)
            expected = served.delta(0, x, table.weights[slots])
            assert relative_rms(y[:, COLUMNS[0]], expected) <= TOLERANCE[torch.float32]
