"""Scores, against their definition computed the plain way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base
from polyrex.adapters.model.intuition import EncoderIdentity, Intuition
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.data.batches import encode_answer
from polyrex.training.data.questions import Question
from polyrex.training.data.tasks import load_tasks
from polyrex.training.evaluation.evaluate import (
    Score,
    evaluate,
    greedy_texts,
    option_scores,
)

MakeAdapted = Callable[[AdapterSpec], AdaptedModel]


@pytest.fixture
def adapted(make_adapted: MakeAdapted) -> AdaptedModel:
    """Poly with random B sides: routing makes a difference."""
    found = make_adapted(AdapterSpec("poly", rank=4, experts=3))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in found.layers:
            for parameter in layer.experts.parameters():
                parameter.normal_(0, 0.7, generator=generator)
    return found


@pytest.fixture
def logits(adapted: AdaptedModel) -> torch.Tensor:
    """A router's logits."""
    return torch.randn(adapted.routing_shape(), generator=torch.Generator().manual_seed(6))


def plain_option_score(adapted: AdaptedModel, prompt: list[int], option: tuple[int, ...]) -> float:
    """Mean token log-probability of one option after its prompt, in a forward pass of its own."""
    base: Any = adapted.model
    tokens = torch.tensor([[*prompt, *option]])
    logprobs = base(input_ids=tokens).logits[0].log_softmax(-1)
    steps = range(len(prompt) - 1, len(prompt) + len(option) - 1)
    return float(sum(logprobs[t, tokens[0, t + 1]].item() for t in steps) / len(option))


@torch.inference_mode()
def test_options_share_a_prompt_and_keep_their_scores(
    adapted: AdaptedModel, logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer.encode("The sky is"), tokenizer.encode("Two plus three is not quite")]
    options = [("blue", "a very dark grey", "cheese"), ("seventeen and a half", "four")]
    questions = [
        Question(tuple(prompt), tuple(encode_answer(tokenizer, text) for text in texts))
        for prompt, texts in zip(prompts, options, strict=True)
    ]
    with adapted.routed(logits):
        found = option_scores(adapted, questions)
        for question, scores in zip(questions, found, strict=True):
            plain = [
                plain_option_score(adapted, list(question.prompt), o) for o in question.options
            ]
            assert [score.logprob for score in scores] == pytest.approx(plain, abs=1e-4)
    base = option_scores(adapted, questions)
    assert [s.logprob for s in base[0]] != pytest.approx([s.logprob for s in found[0]], abs=1e-2)


def test_questions_with_an_intuition_are_routed_for_their_batch_only(tiny_base: Path) -> None:
    model = load_base(str(tiny_base), torch.float32)
    spec = AdapterSpec("trex", rank=2, granularity="model", intuition=3)
    intuition = Intuition(torch.eye(3), EncoderIdentity("none", 3, "0" * 64), spec.gates)
    intuition.reset(torch.Generator().manual_seed(0))
    adapted = attach(model, spec, find_targets(model), intuition=intuition)
    with torch.no_grad():
        for layer in adapted.layers:
            generator = torch.Generator().manual_seed(layer.index)
            layer.experts.get_parameter("lora_b").normal_(generator=generator)
    plain = Question((5, 6, 7), ((8, 9), (10,)))
    with torch.inference_mode():
        (own,) = option_scores(adapted, [replace(plain, intuition=torch.ones(3))])
        (base,) = option_scores(adapted, [plain])
    assert [score.logprob for score in own] != [score.logprob for score in base]
    assert all(layer.added is None for layer in adapted.layers)


@torch.inference_mode()
def test_generated_text_is_greedy_up_to_the_newline(
    adapted: AdaptedModel, logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer.encode(text) for text in ("The sky is", "Two and three make", "A")]
    base: Any = adapted.model
    expected = []
    with adapted.routed(logits):
        found = greedy_texts(adapted, tokenizer, prompts, 6)
        for prompt in prompts:
            tokens = list(prompt)
            for _ in range(6):
                tokens.append(int(base(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            expected.append(str(tokenizer.decode(tokens[len(prompt) :])).split("\n")[0])
    assert found == expected
    assert greedy_texts(adapted, tokenizer, prompts, 6) != expected  # the base model's


def test_exact_match_compares_stripped_text(
    adapted: AdaptedModel,
    logits: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    rows_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (task,) = load_tasks(rows_folder, ("shout",))
    answers = {row.input: row.answer for row in task.rows["test"]}
    wrong = task.rows["test"][0].input

    def said(_: Any, __: Any, prompts: list[list[int]], max_tokens: int) -> list[str]:
        things = [str(tokenizer.decode(prompt)).split("\n")[1] for prompt in prompts]
        return [f" {answers[t]}{'!' if t == wrong else ''}  " for t in things]

    monkeypatch.setattr("polyrex.training.evaluation.evaluate.greedy_texts", said)
    assert evaluate(adapted, tokenizer, task, logits).value == 0.5  # each thing comes twice


def test_scores_do_not_depend_on_the_batch(
    adapted: AdaptedModel,
    logits: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    rows_folder: Path,
) -> None:
    for task in load_tasks(rows_folder):
        together = evaluate(adapted, tokenizer, task, logits, split="train")
        apart = evaluate(adapted, tokenizer, task, logits, split="train", batch_tokens=1)
        assert together == apart


def test_standard_error_is_that_of_a_share() -> None:
    assert Score("exact_match", 100, 0.5).standard_error == pytest.approx(0.05)
    assert Score("exact_match", 0, 0.0).standard_error == 0


def test_routing_ends_with_its_block(adapted: AdaptedModel, logits: torch.Tensor) -> None:
    with adapted.routed(logits):
        pass
    assert all(layer.added is None for layer in adapted.layers)
