"""Scores, greedy texts and composed adapters on the card are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.rows import Row
from polyrex.adapters.spec import AdapterSpec
from polyrex.kernels.routing import RoutingTable
from polyrex.training.data.questions import Question
from polyrex.training.data.tasks import Metric, Task
from polyrex.training.evaluation.evaluate import evaluate, score_questions
from support.card_operators import CUDA
from support.placement import Card
from support.random_inventory import random_adapted
from support.small_model import SPECS, spec_id

CPU = torch.device("cpu")
QUESTIONS = [
    Question((3, 4, 5), ((6,), (7, 8))),
    Question((9, 10, 11, 12, 13), ((6, 7, 8), (14,), (15, 16))),
]


class Letters:
    """Stands in for a tokenizer: a token for each letter."""

    eos_token_id = 2

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + ord(letter) % 40 for letter in text]

    def decode(self, tokens: Tensor, **_: Any) -> str:
        return " ".join(map(str, tokens.tolist()))


def router(adapted: AdaptedModel, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(adapted.routing_shape(), generator=generator)


def logprobs(adapted: AdaptedModel) -> list[float]:
    device = next(adapted.model.parameters()).device
    with adapted.routed(router(adapted).to(device)):
        scores = score_questions(adapted, QUESTIONS)
    return [option.logprob for question in scores for option in question]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_options_are_scored_on_the_card(card: Card, spec: AdapterSpec) -> None:
    found, expected = random_adapted(spec, CUDA), random_adapted(spec, CPU)
    assert logprobs(found) == pytest.approx(logprobs(expected), rel=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_batch_of_questions_waits_for_its_results_alone(card: Card, spec: AdapterSpec) -> None:
    adapted = random_adapted(spec, CUDA)
    with adapted.routed(router(adapted).to(CUDA)):
        card.syncs.clear()
        score_questions(adapted, QUESTIONS)
    assert len(card.syncs) <= 2, card.syncs  # log-probabilities, and whether greedy


@pytest.mark.parametrize("metric", ["rank_classification_accuracy", "exact_match"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_task_is_evaluated_on_the_card(card: Card, spec: AdapterSpec, metric: Metric) -> None:
    rows = tuple(Row(text, "b", ("b", "cd")) for text in ("p", "qrs"))
    task = Task("letters", "Say.", metric, "held_in", "", "", {"test": rows})
    tokenizer: Any = Letters()
    scores = [
        evaluate(adapted, tokenizer, task, router(adapted).to(device))
        for device in (CPU, CUDA)
        for adapted in [random_adapted(spec, device)]
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_a_step_of_many_tasks_runs_by_the_formula(card: Card, spec: AdapterSpec) -> None:
    """What `evaluate` of rows with an intuition each, and the slow twins of engines, run."""
    outputs = []
    for device in (CPU, CUDA):
        adapted = random_adapted(spec, device)
        weights = adapted.route(torch.stack([router(adapted, seed) for seed in range(3)]))
        modules, width = weights.shape[1:]
        table = RoutingTable(4, modules, width, device, max_tokens=6)
        for slot in range(3):
            table.write(slot + 1, weights[slot])
        adapted.add_by_step(table.step([3, 1, 1, 0, 2, 3], torch.float32))
        with torch.inference_mode():
            outputs.append(adapted.model(torch.arange(6, device=device)[None]).logits.cpu())
    torch.testing.assert_close(*outputs)
