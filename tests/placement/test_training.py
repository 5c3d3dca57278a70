"""Every method trains on the card as on the CPU, and the host waits for the card once a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polyrex.adapters.methods.protocol import Experts, Operands
from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.checkpointing import checkpoint_layers
from polyrex.training.model.multi_task import MultiTaskModel
from support.card_operators import CUDA, CardTensor, Misplaced
from support.placement import Card
from support.small_model import SPECS, random_llama, spec_id

CPU = torch.device("cpu")
POLY = AdapterSpec("poly", rank=3, experts=4)
BY_INTUITION = AdapterSpec("trex", rank=3, form="diagonal", granularity="model", intuition=2)
CONFIG = LoopConfig(steps=2, batch_rows=4, accumulate=2, warmup=0)
EXAMPLES = [
    Example(task % 3, tuple(range(1, 5 + task)), tuple(range(20, 23 - task % 2)))
    for task in range(8)
]


def trainer(
    spec: AdapterSpec, device: torch.device, *, checkpointing: bool = False
) -> MultiTaskModel:
    model = random_llama(attn_implementation="eager").to(device)
    if checkpointing:
        checkpoint_layers(model)
    intuition = None
    if spec.intuition:
        intuition = Intuition(torch.eye(2, 5), EncoderIdentity("none", 5, ""), gates=3)
        intuition.reset(torch.Generator().manual_seed(0))
        intuition.to(device)
    adapted = attach(model, spec, find_targets(model), intuition=intuition)
    return MultiTaskModel(adapted, 3, seed=0)


def train(
    model: MultiTaskModel,
    examples: list[Example] = EXAMPLES,
    config: LoopConfig = CONFIG,
    **options: Any,
) -> list[float]:
    """The losses of a run; `options` are those of `run`."""
    curve = run(model, model.parameter_groups(), examples, config, pad=0, **options)
    return [record.loss for record in curve]


def assert_same(found: MultiTaskModel, expected: MultiTaskModel) -> None:
    """Both hold the same parameters, but for rounding: `found` on the card."""
    for (name, own), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert isinstance(own, CardTensor), name
        torch.testing.assert_close(own.detach().cpu(), other.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_run_on_the_card_follows_the_curve_of_the_cpu(card: Card, spec: AdapterSpec) -> None:
    expected, found = trainer(spec, CPU), trainer(spec, CUDA)
    card.syncs.clear()
    card.unpinned.clear()
    losses = train(found)
    own = [line for line in card.syncs if "transformers/masking_utils" not in line]
    assert len(own) == CONFIG.steps, own  # the loss, once a step
    assert len(card.syncs) - len(own) == CONFIG.steps * CONFIG.accumulate
    assert not card.unpinned
    assert losses == pytest.approx(train(expected), rel=1e-5)
    assert_same(found, expected)


@pytest.mark.parametrize("spec", [POLY, BY_INTUITION], ids=spec_id)
def test_layers_run_again_for_their_gradients_on_the_card(card: Card, spec: AdapterSpec) -> None:
    own = torch.ones(2) if spec.intuition else None
    examples = [replace(example, intuition=own) for example in EXAMPLES]
    expected, found = trainer(spec, CPU), trainer(spec, CUDA, checkpointing=True)
    assert train(found, examples) == pytest.approx(train(expected, examples), rel=1e-5)
    assert_same(found, expected)


@pytest.mark.parametrize(("begun", "ended"), [(CPU, CUDA), (CUDA, CPU)], ids=str)
def test_a_run_goes_on_on_another_device(
    card: Card, tmp_path: Path, begun: torch.device, ended: torch.device
) -> None:
    config = replace(CONFIG, steps=3, checkpoint_every=1)
    path = tmp_path / "checkpoint.safetensors"

    def stop(record: StepRecord) -> None:
        if record.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trainer(POLY, begun), config=config, checkpoint=path, progress=stop)
    resumed = train(trainer(POLY, ended), config=config, checkpoint=path)
    assert resumed == pytest.approx(train(trainer(POLY, CPU), config=config), rel=1e-5)


def test_operands_that_stay_on_the_cpu_are_caught(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    poly = METHODS["poly"]
    operands = poly.operands

    def stay(self: Experts, dtype: torch.dtype) -> Operands:
        return tuple(operand.cpu() for operand in operands(self, dtype))

    monkeypatch.setattr(poly, "operands", stay)
    with pytest.raises(Misplaced):
        train(trainer(POLY, CUDA))
