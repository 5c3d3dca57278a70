"""The frozen lower layers' work, computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.errors import SpecError
from polyrex.adapters.model.attach import attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.spec import AdapterSpec, Granularity
from polyrex.training.adapt import ADAPTATION, AdaptMode, fit
from polyrex.training.data.batches import Example, collate, encode_rows
from polyrex.training.data.questions import Question
from polyrex.training.data.tasks import load_tasks
from polyrex.training.evaluation.evaluate import option_scores
from polyrex.training.model import frozen
from polyrex.training.model.frozen import LowerLayers, cut, upper_alone
from polyrex.training.model.multi_task import MultiTaskModel

ALL = r".*_proj"
UPPER = r"model\.layers\.1\..*_proj"
SPEC = AdapterSpec("poly", rank=3, experts=4)


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase, rows_folder: Path) -> list[Example]:
    (task,) = load_tasks(rows_folder, ("shout",))
    return encode_rows(tokenizer, task.instruction, task.rows["train"])


def upper_model(base: Path, targets: str = UPPER, spec: AdapterSpec = SPEC) -> MultiTaskModel:
    model = load_base(str(base), torch.float32)
    adapted = attach(model, spec, find_targets(model, targets))
    with torch.no_grad():
        for layer in adapted.layers:
            layer.experts.get_parameter("lora_b").normal_(
                generator=torch.Generator().manual_seed(layer.index)
            )
    return MultiTaskModel(adapted, 1, seed=0)


def test_cut_model_has_the_loss_and_the_gradients_of_the_whole(
    tiny_base: Path, examples: list[Example], tmp_path: Path
) -> None:
    """The wrong case: hidden states of the whole model without its first layer."""
    whole, upper = upper_model(tiny_base), upper_model(tiny_base)
    lower = LowerLayers(load_base(str(tiny_base), torch.float32), 1, tmp_path)
    known = lower.of_examples("shout", examples)
    cut(upper.adapted.model, 1)
    losses = [whole.loss(collate(examples, 0)), upper.loss(collate(known, 0))]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(upper.logits.grad, whole.logits.grad)
    base = load_base(str(tiny_base), torch.float32)
    wrong = LowerLayers(base, 0, tmp_path).of_examples("shout", examples)
    assert abs(upper.loss(collate(wrong, 0)) - losses[0]) > 1e-3


def test_cut_model_scores_options_as_the_whole_does(tiny_base: Path, tmp_path: Path) -> None:
    questions = [
        Question((5, 6, 7), ((8, 9), (10,), (11, 12, 13))),
        Question((5, 9), ((3,), (4, 4))),
    ]
    whole, upper = upper_model(tiny_base), upper_model(tiny_base)
    lower = LowerLayers(load_base(str(tiny_base), torch.float32), 1, tmp_path)
    known = lower.of_questions("numbers", questions)
    cut(upper.adapted.model, 1)
    with torch.inference_mode():
        found = option_scores(upper.adapted, known)
        expected = option_scores(whole.adapted, questions)
    for scores, others in zip(found, expected, strict=True):
        for score, other in zip(scores, others, strict=True):
            assert score.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert score.greedy == other.greedy


def test_hidden_states_are_computed_once(
    tiny_base: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(tiny_base), torch.float32)
    first = LowerLayers(base, 1, tmp_path).of_examples("shout", examples)
    monkeypatch.setattr(frozen, "hidden_below", None)
    again = LowerLayers(base, 1, tmp_path).of_examples("shout", examples)
    for one, other in zip(first, again, strict=True):
        assert one.hidden is not None
        assert other.hidden is not None
        assert torch.equal(one.hidden, other.hidden)
    with pytest.raises(TypeError):  # other texts are computed
        LowerLayers(base, 1, tmp_path).of_examples("shout", examples[1:])


def test_model_above_adapted_layers_has_the_loss_and_the_gradients_of_the_whole(
    tiny_base: Path, examples: list[Example]
) -> None:
    """And is whole again behind. The wrong case: layers below that another router adapts."""
    model = upper_model(tiny_base, ALL)
    expected = model.loss(collate(examples, 0))
    expected.backward()  # type: ignore[no-untyped-call]
    whole, model.logits.grad = model.logits.grad, None
    assert whole is not None
    above = torch.tensor([".1." in target.name for target in model.adapted.targets])
    with upper_alone(model.adapted, 1, examples, model.logits[0].detach()) as known:
        found = model.loss(collate(known, 0))
        found.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected)
    assert model.logits.grad is not None
    torch.testing.assert_close(model.logits.grad[:, above], whole[:, above])
    assert not model.logits.grad[:, ~above].any()
    torch.testing.assert_close(model.loss(collate(examples, 0)), expected)
    other = torch.randn(model.logits[0].shape, generator=torch.Generator().manual_seed(0))
    with upper_alone(model.adapted, 1, examples, 9 * other) as wrong:
        assert abs(model.loss(collate(wrong, 0)) - expected) > 1e-4


def test_fit_above_leaves_the_routing_below(tiny_base: Path, examples: list[Example]) -> None:
    adapted = upper_model(tiny_base, ALL).adapted
    start = MultiTaskModel(adapted, 1, seed=ADAPTATION.seed).logits[0].detach()
    loop = replace(ADAPTATION, steps=3, batch_rows=4, warmup=1)
    _, logits, _ = fit(adapted, examples, 0, loop, above=1)
    moved = (logits != start).any(1).tolist()
    assert moved == [".1." in target.name for target in adapted.targets]


@pytest.mark.parametrize(
    ("mode", "granularity"), [("both", "module"), ("routing", "model")], ids=["both", "model"]
)
def test_fit_above_refuses_what_reaches_below(
    tiny_base: Path, examples: list[Example], mode: AdaptMode, granularity: Granularity
) -> None:
    model = upper_model(tiny_base, ALL, replace(SPEC, granularity=granularity))
    with pytest.raises(SpecError, match=f"{mode} by {granularity} is fitted on all layers"):
        fit(model.adapted, examples, 0, ADAPTATION, mode=mode, above=1)
