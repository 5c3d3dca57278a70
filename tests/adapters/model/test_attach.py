"""Routed adapters in a model: silent without a task, and each token reads its own row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from polyrex.adapters.errors import SpecError
from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.spec import TargetModule
from polyrex.kernels.routing import RoutingTable
from support.cases import relative_rms

MakeModel = Callable[..., nn.Module]
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture
def adapted(small_inventory: Inventory, make_model: MakeModel) -> AdaptedModel:
    return load_experts(small_inventory, make_model())


@pytest.fixture
def table(adapted: AdaptedModel, small_inventory: Inventory) -> RoutingTable:
    """Two tasks, in slots 1 and 2."""
    table = RoutingTable(3, *small_inventory.table_shape, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for slot in (1, 2):
        logits = 3 * torch.randn(small_inventory.routing_shape, generator=generator)
        table.write(slot, adapted.route(logits))
    return table


@torch.no_grad()
def logits_of(adapted: AdaptedModel, table: RoutingTable, slots: list[int]) -> Tensor:
    """Logits [len(slots), tokens, vocabulary] of the prompt, once for each slot, in one batch."""
    of_tokens = [slot for slot in slots for _ in range(PROMPT.shape[1])]
    adapted.add_by_step(table.step(of_tokens, torch.float32))
    logits: Tensor = adapted.model(PROMPT.expand(len(slots), -1)).logits
    return logits


def test_without_a_task_the_model_is_the_base_model(
    adapted: AdaptedModel, table: RoutingTable, make_model: MakeModel
) -> None:
    base = make_model()(PROMPT).logits
    assert torch.equal(logits_of(adapted, table, [0]), base)


def test_base_request_in_a_mixed_batch_gets_the_base_model(
    adapted: AdaptedModel, table: RoutingTable, make_model: MakeModel
) -> None:
    base = make_model()(PROMPT).logits
    torch.testing.assert_close(logits_of(adapted, table, [1, 0, 2])[1:2], base)


def test_tasks_differ_and_do_not_depend_on_the_batch(
    adapted: AdaptedModel, table: RoutingTable
) -> None:
    mixed = logits_of(adapted, table, [2, 0, 1, 2])
    for row, slot in enumerate([2, 0, 1, 2]):
        torch.testing.assert_close(mixed[row : row + 1], logits_of(adapted, table, [slot]))
    assert relative_rms(mixed[0], mixed[2]) > 1e-3
    assert relative_rms(mixed[1], mixed[2]) > 1e-3


def test_prepared_experts_give_the_same(adapted: AdaptedModel, table: RoutingTable) -> None:
    before = logits_of(adapted, table, [1, 2])
    adapted.prepare(torch.float32)
    torch.testing.assert_close(logits_of(adapted, table, [1, 2]), before)


def test_served_model_gives_the_same(adapted: AdaptedModel, table: RoutingTable) -> None:
    before = logits_of(adapted, table, [1, 0, 2])
    _, context = adapted.serve(torch.float32, 1 << 20)
    slots = [slot for slot in (1, 0, 2) for _ in range(PROMPT.shape[1])]
    with torch.no_grad():
        base = adapted.model(PROMPT).logits
        context.step = table.step(slots, torch.float32)
        served = adapted.model(PROMPT.expand(3, -1)).logits
    torch.testing.assert_close(served, before)
    torch.testing.assert_close(base[0], before[1])


def test_only_the_experts_can_be_trained(adapted: AdaptedModel) -> None:
    trainable = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".experts." in name for name in trainable)


def test_same_seed_draws_the_same_experts(
    small_inventory: Inventory, make_model: MakeModel
) -> None:
    spec, targets = small_inventory.spec, small_inventory.targets
    first, again, other = (attach(make_model(), spec, targets, seed=s) for s in (1, 1, 2))
    leaf = "weight_leafs_a"
    drawn = [a.layers[2].experts.get_parameter(leaf) for a in (first, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_pattern_chooses_the_targets(make_model: MakeModel) -> None:
    found = find_targets(make_model(), r".*\.[qv]_proj")
    assert [(t.name.rpartition(".")[2], t.d_in, t.d_out) for t in found] == [
        ("q_proj", 24, 24),
        ("v_proj", 24, 12),
    ] * 2


def test_pattern_that_matches_nothing_is_an_error(make_model: MakeModel) -> None:
    with pytest.raises(SpecError, match=r"no linear layer matches '\.\*ghost'; the model has 15"):
        find_targets(make_model(), ".*ghost")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TargetModule("model.ghost", 24, 24), "model.ghost: the model has no such linear layer"),
        (TargetModule("lm_head", 24, 51), "lm_head: expected 24 -> 51, the model has 24 -> 50"),
    ],
    ids=["missing", "shape"],
)
def test_target_that_does_not_fit_is_named(
    target: TargetModule, message: str, small_inventory: Inventory, make_model: MakeModel
) -> None:
    spec = replace(small_inventory.spec, granularity="model")
    with pytest.raises(SpecError, match=message):
        attach(make_model(), spec, (target,))
