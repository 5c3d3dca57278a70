"""The card that is not there computes like the CPU, and refuses what a card refuses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from support.card_operators import CUDA, CardTensor, Misplaced
from support.placement import Card, HostSync, UnequalSteps, check_equal
from support.small_model import random_llama

Op = Callable[[Tensor], object]


def trained(device: str) -> tuple[float, list[Tensor]]:
    """The loss of a small model, and its parameters after one step of AdamW."""
    model = random_llama(attn_implementation="eager").to(device)
    tokens = torch.arange(14, device=device).view(2, 7)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    loss: Tensor = model(tokens, labels=tokens).loss
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimiser.step()
    return loss.item(), [parameter.detach().cpu() for parameter in model.parameters()]


def test_a_card_computes_what_the_cpu_computes(card: Card) -> None:
    loss, parameters = trained("cuda")
    expected_loss, expected = trained("cpu")
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    for found, parameter in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found, parameter)


def test_a_parameter_takes_its_data_to_the_card(card: Card) -> None:
    model = random_llama()
    for parameter in model.parameters():
        parameter.data = parameter.data.to("cuda", torch.bfloat16)
    assert {(w.device, w.dtype) for w in model.parameters()} == {(CUDA, torch.bfloat16)}


def test_a_module_moves_to_the_card_and_back(card: Card) -> None:
    model = random_llama()
    on_card = model.to("cuda").bfloat16()
    weights = list(on_card.parameters())
    assert all(isinstance(w, CardTensor) and isinstance(w, nn.Parameter) for w in weights)
    assert {(w.device, w.dtype, w.is_cuda) for w in weights} == {(CUDA, torch.bfloat16, True)}
    assert not any(isinstance(w, CardTensor) for w in on_card.to("cpu").parameters())


def test_views_share_their_memory(card: Card) -> None:
    whole = torch.zeros(3, 2, device="cuda")
    whole[1] = 5
    whole.view(-1)[0] = 7
    assert whole.tolist() == [[7, 0], [5, 5], [0, 0]]


MISPLACED: dict[str, Op] = {
    "add": lambda x: x + torch.zeros(3),
    "mm": lambda x: x[None] @ torch.zeros(3, 2),
    "index": lambda x: x[torch.tensor([1])],
    "index_select": lambda x: x.index_select(0, torch.tensor([1])),
    "embedding": lambda x: nn.functional.embedding(x.long(), torch.zeros(3, 2)),
    "cat": lambda x: torch.cat([x, torch.zeros(1)]),
    "attention": lambda x: attend(x[None], x[None], x[None], torch.zeros(1, 1)),
    "mask": lambda x: x.masked_fill(torch.zeros(3, dtype=torch.bool), 1),
    "a scalar where operators take none": lambda x: torch.stack([x.sum(), torch.zeros(())]),
    "generator": lambda x: x.normal_(generator=torch.Generator()),
    "out": lambda x: torch.add(x, x, out=torch.zeros(3)),
}


@pytest.mark.parametrize("op", MISPLACED.values(), ids=MISPLACED)
def test_tensors_on_two_devices_are_refused(card: Card, op: Op) -> None:
    x = torch.arange(3.0, device="cuda")
    with pytest.raises(Misplaced):
        op(x)


SYNCS: dict[str, Op] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: range(x[1].long()),
    "float": lambda x: float(x.sum()),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy": lambda x: torch.zeros(3).copy_(x),
    "copy to memory that is not pinned": lambda x: torch.zeros(3).copy_(x, non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "put by a mask": lambda x: x.index_put_((x > 0,), x[1:].clone()),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "bincount": lambda x: torch.bincount(x.long()),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "inverse": lambda x: torch.linalg.inv(x.diag() + 1),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("op", SYNCS.values(), ids=SYNCS)
def test_a_decode_step_in_which_the_host_waits_is_refused(
    card: Card, op: Op, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    x = torch.arange(3.0, device="cuda")
    with mode(), card.decode_step(), pytest.raises(HostSync, match=r"test_mode\.py:\d+"):
        op(x)


@pytest.mark.parametrize("op", SYNCS.values(), ids=SYNCS)
def test_elsewhere_the_host_may_wait_and_it_is_noted(card: Card, op: Op) -> None:
    x = torch.arange(3.0, device="cuda")
    op(x)
    assert card.syncs
    with card.decode_step(), card.sync_allowed():
        op(x)


FREE: dict[str, Op] = {
    "a number": lambda x: x * 2 + 1,
    "a scalar of the CPU": lambda x: x * torch.tensor(2.0),
    "one number by a mask": lambda x: torch.Tensor.__setitem__(x, x > 0, 1.0),
    "repeat_interleave of a known size": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "new tensors": lambda x: x.new_zeros(3) + torch.ones_like(x) + torch.arange(3, device=x.device),
    "copy to pinned memory": lambda x: torch.empty(3, pin_memory=True).copy_(x, non_blocking=True),
    "copy from pinned memory": lambda x: x.copy_(torch.zeros(3).pin_memory(), non_blocking=True),
    "noise": lambda x: torch.rand_like(x),
    "sort": lambda x: x.topk(2)[0].cumsum(-1),
    "vmap": lambda x: torch.vmap(lambda row: row @ x)(torch.zeros(4, 3, device=x.device)),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("op", FREE.values(), ids=FREE)
def test_what_a_card_does_by_itself_is_let_through(
    card: Card, op: Op, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    x = torch.arange(3.0, device="cuda")
    with mode(), card.decode_step():
        op(x)
    assert not card.syncs
    assert not card.unpinned


def test_copies_from_memory_that_is_not_pinned_are_noted(card: Card) -> None:
    torch.tensor([1, 2], device="cuda")
    torch.zeros(3).to("cuda")
    torch.zeros(3, device="cuda").copy_(torch.zeros(3))
    assert len(card.unpinned) == 3


def test_steps_of_other_sizes_are_unequal(card: Card) -> None:
    def step(size: int) -> Tensor:
        return torch.zeros(size, device="cuda")

    with card.decode_step() as first:
        step(3)
    with card.decode_step() as same:
        step(3)
    check_equal(first, same)
    with card.decode_step() as other:
        step(4)
    with card.decode_step() as longer:
        step(3).add_(1)
    for found in (other, longer):
        with pytest.raises(UnequalSteps):
            check_equal(first, found)


def record(card: Card, step: Callable[[Tensor], object]) -> None:
    """Replay a graph of `step` after its input has changed as a graph allows."""
    x = torch.arange(3.0, device="cuda")
    replay = card.record(lambda: (step(x), None)[1])
    x.add_(1)
    replay()


def test_a_graph_of_operators_on_fixed_tensors_is_replayed(card: Card) -> None:
    kept = torch.zeros(3, device="cuda")

    def step(x: Tensor) -> None:
        kept.copy_((x * 2).softmax(-1).cumsum(-1))

    record(card, step)
    assert kept[-1].item() == pytest.approx(1)


def test_a_graph_that_copies_from_the_host_is_refused(card: Card) -> None:
    with pytest.raises(HostSync):
        record(card, lambda x: x + torch.tensor([1, 2, 3], device="cuda"))


def test_a_graph_that_reads_another_address_is_refused(card: Card) -> None:
    tensors = [torch.zeros(3, device="cuda") for _ in range(3)]
    with pytest.raises(UnequalSteps):
        record(card, lambda x: x + tensors.pop())


def test_a_graph_that_depends_on_a_number_of_the_host_is_refused(card: Card) -> None:
    numbers = [1, 2, 3]
    with pytest.raises(UnequalSteps):
        record(card, lambda x: x + numbers.pop())


def test_a_view_launches_nothing(card: Card) -> None:
    x = torch.arange(3.0, device="cuda")
    with card.decode_step() as launches:
        x[1:].view(2, 1).transpose(0, 1).unbind(1)
    assert not launches
