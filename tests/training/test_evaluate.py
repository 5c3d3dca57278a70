"""Scores, against their definition computed the plain way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.attach import AdaptedModel
from polyrex.adapters.spec import AdapterSpec
from polyrex.training.batches import encode_answer
from polyrex.training.data import Task, load_tasks, prompt_of
from polyrex.training.evaluate import Score, evaluate, option_scores, routed

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
    return sum(logprobs[t, tokens[0, t + 1]].item() for t in steps) / len(option)


@torch.inference_mode()
def test_options_share_a_prompt_and_keep_their_scores(
    adapted: AdaptedModel, logits: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer.encode("The sky is"), tokenizer.encode("Two plus three is not quite")]
    options = [
        [encode_answer(tokenizer, text) for text in ("blue", "a very dark grey", "cheese")],
        [encode_answer(tokenizer, text) for text in ("seventeen and a half", "four")],
    ]
    with routed(adapted, logits):
        found = option_scores(adapted, prompts, options)
        for prompt, choices, scores in zip(prompts, options, found, strict=True):
            plain = [plain_option_score(adapted, prompt, choice) for choice in choices]
            assert scores == pytest.approx(plain, abs=1e-4)
    base = option_scores(adapted, prompts, options)
    assert base[0] != pytest.approx(found[0], abs=1e-2)


@torch.inference_mode()
def test_exact_match_is_greedy_text_up_to_the_newline(
    adapted: AdaptedModel,
    logits: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    rows_folder: Path,
) -> None:
    (task,) = load_tasks(rows_folder, ("shout",))
    base: Any = adapted.model
    answers = []
    with routed(adapted, logits):
        for row in task.rows["test"]:
            tokens = tokenizer.encode(prompt_of(task.instruction, row))
            start = len(tokens)
            for _ in range(4):
                tokens.append(int(base(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            answers.append(str(tokenizer.decode(tokens[start:])).split("\n")[0].strip())
    rows = tuple(
        row.__class__(row.input, answer, None)
        for row, answer in zip(task.rows["test"], answers, strict=True)
    )
    told = Task(**{**vars(task), "rows": {**task.rows, "test": rows}})
    longest = max(len(encode_answer(tokenizer, answer)) for answer in answers)
    assert longest >= 3  # else the comparison would say nothing
    score = evaluate(adapted, tokenizer, told, logits)
    assert score.value >= 0.5
    assert evaluate(adapted, tokenizer, told, None).value == 0


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
    with routed(adapted, logits):
        pass
    assert adapted.context.step is None
