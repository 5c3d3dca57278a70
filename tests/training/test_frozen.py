"""The frozen lower layers' work, computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.attach import attach, find_targets
from polyrex.adapters.base_model import load_base
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.batches import Example, collate, encode_rows
from polyrex.training.data import load_tasks
from polyrex.training.evaluate import option_scores
from polyrex.training.frozen import LowerLayers, cut
from polyrex.training.model import MultiTaskModel
from polyrex.training.questions import Question

UPPER = r"model\.layers\.1\..*_proj"
SPEC = AdapterSpec("poly", rank=3, experts=4)


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerBase, rows_folder: Path) -> list[Example]:
    (task,) = load_tasks(rows_folder, ("shout",))
    return encode_rows(tokenizer, task.instruction, task.rows["train"])


def upper_model(base: Path) -> MultiTaskModel:
    model = load_base(str(base), torch.float32)
    adapted = attach(model, SPEC, find_targets(model, UPPER))
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
    monkeypatch.setattr(LowerLayers, "_compute", None)
    again = LowerLayers(base, 1, tmp_path).of_examples("shout", examples)
    for one, other in zip(first, again, strict=True):
        assert one.hidden is not None
        assert other.hidden is not None
        assert torch.equal(one.hidden, other.hidden)
    with pytest.raises(TypeError):  # other texts are computed
        LowerLayers(base, 1, tmp_path).of_examples("shout", examples[1:])
