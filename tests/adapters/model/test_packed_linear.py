"""Projections that run as one product give what they gave alone, with and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.packed_linear import PackedLinear, PackedMember, pack_projections
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.routing import RoutingTable
from support.cases import relative_rms
from support.random_inventory import make_inventory, make_task
from support.small_model import SPECS, random_llama, spec_id

MakeModel = Callable[..., nn.Module]
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
SLOTS = (1, 0, 2)


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    random_llama().save_pretrained(folder)  # type: ignore[operator]
    return folder


def members(model: nn.Module) -> list[PackedMember]:
    return [module for module in model.modules() if isinstance(module, PackedMember)]


@torch.inference_mode()
def served(adapted: AdaptedModel, inventory: Inventory, *, pack: bool) -> Tensor:
    """Logits of the prompt for two tasks and the base model, in one batch of an engine."""
    planner, context = adapted.serve(torch.float32, 1 << 20, pack=pack)
    table = RoutingTable(3, *inventory.table_shape, torch.device("cpu"), planner=planner)
    for slot in (1, 2):
        table.write(slot, make_task(inventory, slot).router.weights)
    context.set(table.step([slot for slot in SLOTS for _ in range(PROMPT.shape[1])], torch.float32))
    logits: Tensor = adapted.model(PROMPT.expand(len(SLOTS), -1)).logits
    return logits


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_every_method_adds_the_same(spec: AdapterSpec, llama_base: str, tmp_path: Path) -> None:
    inventory = make_inventory(tmp_path / "inventory.safetensors", llama_base, spec)
    adapted = load_experts(inventory, random_llama())
    alone = served(adapted, inventory, pack=False)
    together = served(adapted, inventory, pack=True)
    assert relative_rms(together, alone) < 1e-5
    assert len(members(adapted.model)) == 2 * 5
    # A wrong case: k for v, and v for k.
    packed = members(adapted.model)[0].packed
    packed.columns[1], packed.columns[2] = packed.columns[2], packed.columns[1]
    assert relative_rms(adapted.model(PROMPT.expand(len(SLOTS), -1)).logits, alone) > 1e-3


def test_the_base_model_alone_gives_the_same(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    adapted = load_experts(small_inventory, make_model())
    served(adapted, small_inventory, pack=True)
    adapted.add_nothing()
    with torch.no_grad():
        torch.testing.assert_close(adapted.model(PROMPT).logits, make_model()(PROMPT).logits)


def test_what_is_added_after_serving_is_added_once(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    packed, plain = (load_experts(small_inventory, make_model()) for _ in range(2))
    served(packed, small_inventory, pack=True)
    logits = []
    for adapted in (packed, plain):
        task = make_task(small_inventory, 1).router.logits
        with torch.no_grad(), adapted.routed(task):
            logits.append(adapted.model(PROMPT).logits)
    torch.testing.assert_close(*logits)


def test_an_earlier_model_leaves_no_adapters_behind(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    model = make_model()
    served(load_experts(small_inventory, model), small_inventory, pack=True)
    for layer in model.modules():
        for name, child in list(layer.named_children()):
            if hasattr(child, "experts"):
                setattr(layer, name, child.base)
    load_experts(small_inventory, model)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, make_model()(PROMPT).logits)


def test_weights_are_views_of_one(make_model: MakeModel) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pack_projections(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(after) == len(before)
    for member in members(model):
        whole = member.packed.weight
        assert member.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def layers(*biases: bool) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, 2 + number, bias=bias) for number, bias in enumerate(biases)]


@torch.no_grad()
def test_a_member_that_is_called_with_another_x_is_right() -> None:
    alone = layers(True, True)
    packed = PackedLinear(alone)
    first, second = (PackedMember(packed, number) for number in (0, 1))
    x, other = torch.randn(2, 3, 6)
    for member, twin, given in (
        (first, alone[0], x),
        (second, alone[1], other),
        (first, alone[0], other),
        (second, alone[1], x),
        (second, alone[1], x),
        (first, alone[0], x),
    ):
        torch.testing.assert_close(member(given), twin(given))


@torch.no_grad()
def test_what_was_computed_is_given_once() -> None:
    packed = PackedLinear(layers(False, False))
    first, second = (PackedMember(packed, number) for number in (0, 1))
    x = torch.randn(3, 6)
    before = first(x), second(x)
    x.mul_(2)  # the same tensor, with other values in it, as a CUDA graph has it
    torch.testing.assert_close(first(x), 2 * before[0])
    torch.testing.assert_close(second(x), 2 * before[1])


class Parent(nn.Module):
    def __init__(self, gate: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = gate, up


class Other(nn.Linear):
    """A linear layer whose weight may not be what it seems, such as a quantised one."""


@pytest.mark.parametrize(
    "parent",
    [
        Parent(*layers(True, False)),
        Parent(nn.Linear(6, 2), nn.Linear(7, 2)),
        Parent(nn.Linear(6, 2), Other(6, 2)),
        Parent(nn.Linear(6, 2), nn.Linear(6, 2, dtype=torch.bfloat16)),
        Parent(nn.Linear(6, 2), nn.Identity()),
    ],
    ids=["biases", "inputs", "kinds", "dtypes", "missing"],
)
def test_what_does_not_fit_together_stays_alone(parent: Parent) -> None:
    before = parent.gate_proj, parent.up_proj
    pack_projections(parent)
    assert (parent.gate_proj, parent.up_proj) == before
