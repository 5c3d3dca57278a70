"""The training loop, with every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.errors import DataError
from polyrex.adapters.methods.protocol import LearningRates
from polyrex.adapters.methods.registry import METHODS
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.rows import Row
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import Example, batch_indices, collate, encode_rows
from polyrex.training.loop.run import LoopConfig, StepRecord, run
from polyrex.training.model.multi_task import MultiTaskModel
from polyrex.training.train import TrainConfig

MakeAdapted = Callable[[AdapterSpec], AdaptedModel]

SPEC = AdapterSpec("tensorpoly-1", rank=3, experts=4)
LOOP = LoopConfig(
    steps=8, batch_rows=4, rates=LearningRates(gates=1e-2), warmup=2, checkpoint_every=3
)
SPECS = [
    AdapterSpec(name, rank=4, experts=6 if "experts" in cls.uses else 1)
    for name, cls in METHODS.items()
] + [AdapterSpec("trex", rank=4, form="static"), AdapterSpec("trex", rank=4, form="diagonal")]


def trained(
    adapted: AdaptedModel, examples: list[Example], loop: LoopConfig, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and every trained tensor, of a run."""
    model = MultiTaskModel(adapted, 2, seed=loop.seed)
    curve = run(model, model.parameter_groups(), examples, loop, pad=0, **options)
    return [r.loss for r in curve], {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.method}-{spec.form}")
def test_every_method_learns_in_the_same_loop(
    make_adapted: MakeAdapted, examples: list[Example], spec: AdapterSpec
) -> None:
    loop = replace(LOOP, steps=40, rates=LearningRates(experts=2e-2, gates=2e-2))
    losses, _ = trained(make_adapted(spec), examples, loop)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_fresh_adapters_leave_the_base_models_loss(
    make_adapted: MakeAdapted, examples: list[Example]
) -> None:
    model = MultiTaskModel(make_adapted(SPEC), 2, seed=0)
    batch = collate(examples[:5], 0)
    found = model.loss(batch)
    model.adapted.add_nothing()
    base: Any = model.adapted.model
    logits = base(**batch.inputs).logits
    rows = []
    for own, example in zip(logits, examples, strict=False):
        start = len(example.prompt) - 1
        answer = torch.tensor(example.answer)
        rows.append(F.cross_entropy(own[start : start + len(answer)], answer))
    torch.testing.assert_close(found, torch.stack(rows).mean())


def test_loss_leaves_nothing_on_the_model(
    make_adapted: MakeAdapted, examples: list[Example]
) -> None:
    """Not even where the forward pass fails."""
    model = MultiTaskModel(make_adapted(SPEC), 2, seed=0)
    batch = collate(examples[:5], 0)
    model.loss(batch)
    assert all(layer.added is None for layer in model.adapted.layers)
    with pytest.raises(IndexError):
        model.loss(replace(batch, inputs={"input_ids": torch.tensor([[10**6]])}))
    assert all(layer.added is None for layer in model.adapted.layers)


def test_experts_that_were_trained_and_frozen_again_are_derived_anew(
    make_adapted: MakeAdapted, examples: list[Example]
) -> None:
    adapted = make_adapted(SPEC)
    model = MultiTaskModel(adapted, 2, seed=0)
    batch = collate(examples[:5], 0)
    model.experts.requires_grad_(False)
    fresh = model.loss(batch)
    run(model, model.parameter_groups(), examples, LOOP, pad=0)
    model.experts.requires_grad_(False)
    again = MultiTaskModel(adapted, 2, seed=0)
    again.logits.data.copy_(model.logits)
    assert torch.equal(model.loss(batch), again.loss(batch))
    assert not torch.equal(model.loss(batch), fresh)


def test_routing_that_is_not_trained_is_in_no_group(make_adapted: MakeAdapted) -> None:
    model = MultiTaskModel(make_adapted(SPEC), 2, seed=0)
    trained, fixed = model.parameter_groups(), model.parameter_groups(routing=False)
    assert [name for name, _ in trained["routing"]] == ["logits"]
    assert fixed == trained | {"routing": []}


def test_epochs_count_unless_steps_are_given() -> None:
    config = TrainConfig(Path(), Path(), SPEC, epochs=2.5, loop=LoopConfig(steps=0, batch_rows=4))
    assert config.steps(rows=16) == 10
    assert replace(config, loop=LoopConfig(steps=7, batch_rows=4)).steps(rows=16) == 7


def test_same_seed_gives_the_same_curve(make_adapted: MakeAdapted, examples: list[Example]) -> None:
    first, tensors = trained(make_adapted(SPEC), examples, LOOP)
    second, again = trained(make_adapted(SPEC), examples, LOOP)
    other, _ = trained(make_adapted(SPEC), examples, replace(LOOP, seed=1))
    assert first == second
    assert first != other
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_killed_run_resumes_to_the_same_result(
    make_adapted: MakeAdapted,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, tensors = trained(make_adapted(SPEC), examples, LOOP)
    checkpoint = tmp_path / "checkpoint.safetensors"
    calls = []

    class Killed(BaseException):
        """As abrupt as a signal: nothing of the loop catches it."""

    def die(model: MultiTaskModel, batch: Any, *, sample: bool) -> torch.Tensor:
        calls.append(batch)
        if len(calls) > 5:
            raise Killed
        return loss(model, batch, sample=sample)

    loss = MultiTaskModel.loss
    monkeypatch.setattr(MultiTaskModel, "loss", die)
    with pytest.raises(Killed):
        trained(make_adapted(SPEC), examples, LOOP, checkpoint=checkpoint)
    monkeypatch.undo()
    resumed, again = trained(make_adapted(SPEC), examples, LOOP, checkpoint=checkpoint)
    assert resumed == whole
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_checkpoint_of_another_configuration_is_refused(
    make_adapted: MakeAdapted, examples: list[Example], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    trained(make_adapted(SPEC), examples, LOOP, checkpoint=checkpoint)
    with pytest.raises(DataError, match="a checkpoint of another configuration"):
        trained(make_adapted(SPEC), examples, replace(LOOP, seed=1), checkpoint=checkpoint)


def test_no_rows_is_an_error(make_adapted: MakeAdapted) -> None:
    with pytest.raises(DataError, match="no rows to train on"):
        trained(make_adapted(SPEC), [], LOOP)


def test_rows_that_do_not_fit_are_told_of(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Row("one two three four five six", "seven", None), Row("one", "two", None)]
    whole = encode_rows(tokenizer, "Go on.", rows)
    cut = encode_rows(tokenizer, "Go on.", rows, max_tokens=len(whole[0]) - 2)
    assert cut[0].prompt == whole[0].prompt[2:]
    assert (cut[0].answer, cut[1].prompt) == (whole[0].answer, whole[1].prompt)
    assert "1 of 2 prompts lost their beginning" in caplog.text
    with pytest.raises(DataError, match="an answer of 2 tokens leaves no room"):
        encode_rows(tokenizer, "Go on.", rows, max_tokens=2)


def test_an_epoch_holds_every_row_once() -> None:
    lengths = [1 + 7 * i % 13 for i in range(101)]
    batches = batch_indices(lengths, 8, seed=3, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(101))
    assert batches != batch_indices(lengths, 8, seed=3, epoch=2)


def test_curve_records_are_numbers(make_adapted: MakeAdapted, examples: list[Example]) -> None:
    model = MultiTaskModel(make_adapted(SPEC), 2, seed=0)
    curve = run(model, model.parameter_groups(), examples, replace(LOOP, steps=2), pad=0)
    assert [record.step for record in curve] == [0, 1]
    assert all(isinstance(r, StepRecord) and r.tokens_per_second > 0 for r in curve)
