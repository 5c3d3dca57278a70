"""Layers that run again for their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError
from transformers import T5Config, T5ForConditionalGeneration

from polyrex.adapters.errors import SpecError
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.model import checkpointing
from polyrex.training.model.checkpointing import Added, checkpoint_layers
from polyrex.training.model.multi_task import MultiTaskModel
from support.small_model import SPECS, random_llama, spec_id

EXAMPLES = [Example(row % 2, tuple(range(1, 6 + row)), (7, 8)) for row in range(4)]
POLY = AdapterSpec("poly", rank=2, experts=3)


def gradients(base: nn.Module, spec: AdapterSpec, pattern: str) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step, and the bytes that the forward pass kept for them."""
    adapted = attach(base, spec, find_targets(base, pattern))
    with torch.no_grad():  # fresh experts have no gradients on one side
        for number, parameter in enumerate(adapted.layers[0].experts.parameters()):
            parameter.add_(0.1 * (number + 1))
    model = MultiTaskModel(adapted, 2, seed=0)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    torch.manual_seed(0)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.loss(model.collate(EXAMPLES, 0), sample=True)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found, sum(kept)


def llama(*, checkpointed: bool) -> nn.Module:
    model = random_llama(attn_implementation="eager")
    if checkpointed:
        checkpoint_layers(model)
    return model


def t5(*, checkpointed: bool) -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=30, num_layers=2, num_heads=3)
    config.decoder_start_token_id = 0
    model: nn.Module = T5ForConditionalGeneration(config)
    model.eval()
    if checkpointed:
        checkpoint_layers(model)
    return model


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_gradients_are_those_of_one_run(spec: AdapterSpec) -> None:
    expected, most = gradients(llama(checkpointed=False), spec, ".*_proj")
    found, kept = gradients(llama(checkpointed=True), spec, ".*_proj")
    assert expected.keys() == found.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert kept < most / 2


@pytest.mark.parametrize("spec", [POLY, AdapterSpec("molora", rank=2, experts=3)], ids=spec_id)
def test_an_encoder_and_its_decoder_run_again(spec: AdapterSpec) -> None:
    expected, _ = gradients(t5(checkpointed=False), spec, r".*\.(q|v|wo)")
    found, _ = gradients(t5(checkpointed=True), spec, r".*\.(q|v|wo)")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_second_run_without_the_adapters_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong case: layers run again with what they add at that time, which is nothing."""

    @contextmanager
    def as_it_is(_: Added) -> Iterator[None]:
        yield

    monkeypatch.setattr(checkpointing, "_adding", as_it_is)
    with pytest.raises(CheckpointError):
        gradients(llama(checkpointed=True), POLY, ".*_proj")


def test_scoring_keeps_nothing_and_says_the_same() -> None:
    tokens: Any = torch.arange(8).view(2, 4)
    with torch.inference_mode():
        outputs = [llama(checkpointed=each)(tokens).logits for each in (False, True)]
    assert torch.equal(*outputs)


def test_model_without_such_layers_is_refused() -> None:
    with pytest.raises(SpecError, match="Linear has no layers that gradients"):
        checkpoint_layers(nn.Linear(2, 2))
