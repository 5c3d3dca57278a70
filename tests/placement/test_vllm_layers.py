"""Served layers as vLLM's plugin builds them: packed, cut over ranks, padded, and replayed.

None of this needs vLLM. In this process, the layers run on PyTorch's operators, and in that of
`test_triton_interpreter.py` on the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from polyrex.adapters.methods.registry import make_experts, method_class
from polyrex.adapters.serving.builder import LayerBuilder
from polyrex.adapters.serving.layers import Slice, StepContext
from polyrex.adapters.spec import AdapterSpec, TargetModule
from polyrex.kernels.routing import RoutingTable
from support.card_operators import CUDA, Misplaced
from support.placement import Card, UnequalSteps
from support.small_model import SPECS, spec_id

CPU = torch.device("cpu")
TOKENS = 8  # to which every step is padded

Part = tuple[int, int, slice, slice]
"""d_in and d_out of a module, and the parts of them that one rank has."""

LAYERS: dict[str, tuple[Part, ...]] = {
    "packed": tuple((16, d, slice(0, 16), slice(0, d)) for d in (24, 8, 8)),
    "packed-columns-of-rank-1": tuple((16, 2 * d, slice(0, 16), slice(d, 2 * d)) for d in (12, 4)),
    "rows-of-rank-1": ((24, 16, slice(12, 24), slice(0, 16)),),
}


class Layer:
    """One layer with random experts, and three tasks in its routing table."""

    def __init__(self, spec: AdapterSpec, parts: Sequence[Part], device: torch.device) -> None:
        self.context = StepContext()
        builder = LayerBuilder(torch.float32, device, 1 << 20, self.context)
        slices = list(_slices(spec, parts, device))
        with torch.inference_mode():
            self._layer = builder.build(slices)
        planner = builder.planner(slices[0].experts, 3)
        method = method_class(spec.method)
        size = 4, len(parts), method.table_size(spec)
        self._table = RoutingTable(*size, device, planner=planner, max_tokens=TOKENS)
        generator = torch.Generator().manual_seed(5)
        for slot in (1, 2, 3):
            logits = torch.randn(len(parts), method.routing_size(spec), generator=generator)
            self._table.write(slot, method.route(spec, logits))
        width = slices[0].inputs.stop - slices[0].inputs.start
        self.x = torch.randn(TOKENS, width, generator=generator).to(device)
        self.y = torch.zeros(TOKENS, slices[-1].columns.stop, device=device)

    def route(self, slots: Sequence[int]) -> None:
        """Set the routing of the next step, padded with tokens of the base model."""
        padding = [0] * (TOKENS - len(slots))
        self.context.set(self._table.step([*slots, *padding], torch.float32))

    def run(self) -> None:
        """What a graph holds."""
        step = self.context.step
        assert step is not None
        self.y.zero_()
        self._layer.add_(self.y, self.x, step)


def _slices(spec: AdapterSpec, parts: Sequence[Part], device: torch.device) -> list[Slice]:
    slices, begin = [], 0
    for index, (d_in, d_out, inputs, outputs) in enumerate(parts):
        experts = make_experts(spec, TargetModule(str(index), d_in, d_out))
        generator = torch.Generator().manual_seed(index)
        for name, parameter in experts.named_parameters():
            nn.init.normal_(parameter, std=1e-2 if "raw" in name else 0.7, generator=generator)
        columns = slice(begin, begin + outputs.stop - outputs.start)
        begin = columns.stop
        if experts.routes_by_token:  # the plugin gathers the inputs of all ranks
            inputs = slice(0, d_in)
        slices.append(Slice(index, experts.to(device), columns, inputs, outputs))
    return slices


@torch.inference_mode()
def steps(layer: Layer, card: Card | None) -> list[Tensor]:
    """The outputs for three steps; with a card, the last two are replays of a graph of the first.

    Some tokens are of the base model, and the number of tasks differs.
    """
    layer.route([1, 1, 2])
    layer.run()
    found = [layer.y.cpu().clone()]
    run = layer.run if card is None else card.record(layer.run)
    for slots in ([3, 0, 1, 2, 2], [2]):
        layer.route(slots)
        run()
        found.append(layer.y.cpu().clone())
    return found


@pytest.mark.parametrize("parts", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_layer_is_replayed_with_other_tasks(
    card: Card, spec: AdapterSpec, parts: Sequence[Part]
) -> None:
    found = steps(Layer(spec, parts, CUDA), card)
    expected = steps(Layer(spec, parts, CPU), None)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-4)
        assert own.abs().max() > 1e-2
    assert not found[-1][1:].any()


@pytest.mark.parametrize("spec", [AdapterSpec("poly", rank=3, experts=4)], ids=spec_id)
def test_weights_at_another_address_are_caught(card: Card, spec: AdapterSpec) -> None:
    layer = Layer(spec, LAYERS["packed"], CUDA)
    layer.route([1])
    run = card.record(layer.run)
    step = layer.context.step
    assert step is not None
    layer.context.set(replace(step, weights=step.weights.clone()))
    with pytest.raises(UnequalSteps):
        run()


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_tokens_that_stay_on_the_cpu_are_caught(card: Card, spec: AdapterSpec) -> None:
    layer = Layer(spec, LAYERS["packed"], CUDA)
    layer.x = layer.x.cpu()
    layer.route([1])
    with pytest.raises(Misplaced):
        layer.run()
