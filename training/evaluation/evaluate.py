"""Scores of tasks, by rank classification or exact match."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.devices import send
from polyrex.adapters.rows import Row
from polyrex.kernels.routing import StepRouting
from polyrex.training.data.batches import by_length, encode_answer
from polyrex.training.data.questions import Question, last_hidden
from polyrex.training.data.tasks import Metric, Split, Task, prompt_of


@dataclass(frozen=True)
class Score:
    """A task's score on one split: the share of its `rows` with a correct answer."""

    metric: Metric
    rows: int
    value: float

    @property
    def standard_error(self) -> float:
        """The standard error of a share of independent rows."""
        return math.sqrt(self.value * (1 - self.value) / max(1, self.rows))


@torch.inference_mode()
def evaluate(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    logits: Tensor | None,
    *,
    split: Split = "test",
    batch_tokens: int = 4096,
) -> Score:
    """Score one split of a task under a router's logits [groups, R]; None scores the base model.

    For rank_classification_accuracy, the answer is the option with the highest mean token
    log-probability after the prompt; for exact_match, the greedy text up to the first newline,
    stripped.
    """
    rows = task.rows[split]
    prompts = [tokenizer.encode(prompt_of(task.instruction, row)) for row in rows]
    judge = _rank if task.metric == "rank_classification_accuracy" else _match
    with adapted.routed(logits):
        right = judge(adapted, tokenizer, rows, prompts, batch_tokens)
    return Score(task.metric, len(rows), sum(right) / max(1, len(rows)))


@dataclass(frozen=True)
class OptionScore:
    """An option's mean token log-probability after its prompt, and whether greedy decoding would
    produce it."""

    logprob: float
    greedy: bool


def option_scores(
    adapted: AdaptedModel, questions: Sequence[Question], stops: Sequence[int] = ()
) -> list[list[OptionScore]]:
    """The scores of each question's options, under its own intuition if it has one, or otherwise
    the adapter that the model adds at present.

    `stops` are tokens that end an answer: for `greedy`, any of them matches any other.
    """
    base: Any = adapted.model
    with _routed_by_intuition(adapted, questions):
        hidden = last_hidden(base, questions)
    width = hidden.shape[1]
    found = torch.tensor([width * row + n for row, q in enumerate(questions) for n in q.sources])
    options = [option for question in questions for option in question.options]
    wanted = send(torch.tensor([token for option in options for token in option]), adapted.device)
    # A prompt's last token predicts the first token of every option; its logits are computed once.
    once = torch.unique(found, return_inverse=True)
    distinct, which = (send(each, adapted.device) for each in once)
    chosen = hidden.flatten(0, 1).index_select(0, distinct)
    logits = base.get_output_embeddings()(chosen).float()
    picked = logits[which, wanted] - logits.logsumexp(-1)[which]
    best = logits.argmax(-1)[which]
    ends = torch.tensor(list(stops), device=adapted.device)
    greedy = (best == wanted) | (torch.isin(best, ends) & torch.isin(wanted, ends))
    lengths = [len(option) for option in options]
    scores = iter(
        OptionScore(logprobs.mean().item(), bool(right.all()))
        for logprobs, right in zip(
            torch.split(picked.cpu(), lengths), torch.split(greedy.cpu(), lengths), strict=True
        )
    )
    return [[next(scores) for _ in question.options] for question in questions]


@contextmanager
def _routed_by_intuition(adapted: AdaptedModel, questions: Sequence[Question]) -> Iterator[None]:
    """Within this context, each question is routed by its own intuition, if the questions have any.

    Otherwise, the model goes on adding what it adds at present.
    """
    own = [q.intuition for q in questions if q.intuition is not None]
    if not own:
        yield
        return
    weights = adapted.route(send(torch.stack(own), adapted.device).unsqueeze(1))
    rows = torch.arange(len(own), device=adapted.device)
    adapted.add_by_step(StepRouting(weights, rows, adapted.dtype))
    try:
        yield
    finally:
        adapted.add_nothing()


def _rank(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    batch_tokens: int,
) -> list[bool]:
    questions = [
        Question(tuple(prompt), tuple(encode_answer(tokenizer, o) for o in row.options or ()))
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    found = score_questions(adapted, questions, batch_tokens=batch_tokens)
    return [
        (row.options or ())[best_option(scores)] == row.answer
        for row, scores in zip(rows, found, strict=True)
    ]


@torch.inference_mode()
def score_questions(
    adapted: AdaptedModel,
    questions: Sequence[Question],
    *,
    stops: Sequence[int] = (),
    batch_tokens: int = 4096,
) -> list[list[OptionScore]]:
    """`option_scores` of any number of questions, in batches of similar lengths."""
    found: list[list[OptionScore]] = [[]] * len(questions)
    for indices in by_length([len(question) for question in questions], batch_tokens):
        batch = option_scores(adapted, [questions[i] for i in indices], stops)
        for index, scores in zip(indices, batch, strict=True):
            found[index] = scores
    return found


def best_option(scores: Sequence[OptionScore]) -> int:
    """The index of the option with the highest mean token log-probability."""
    return max(range(len(scores)), key=lambda i: scores[i].logprob)


def greedy_texts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt up to the first newline, with the adapter that the
    model adds at present."""
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), tokenizer.eos_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all prompts end together
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    base: Any = adapted.model
    # The last positions of a padded batch are strided, for which torch would copy the output
    # layer's weight once per row, gigabytes in all.
    handle = base.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].contiguous(),)
    )
    try:
        out = base.generate(
            input_ids=send(tokens, adapted.device),
            attention_mask=send(mask, adapted.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, newline],
            pad_token_id=tokenizer.eos_token_id,
        )
    finally:
        handle.remove()
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in out[:, width:]]
    return [text.split("\n")[0] for text in texts]


def _match(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    batch_tokens: int,
) -> list[bool]:
    # A text that is longer than the longest answer matches none.
    longest = max(len(encode_answer(tokenizer, row.answer)) for row in rows) + 1
    right = [False] * len(rows)
    for indices in by_length([len(p) + longest for p in prompts], batch_tokens):
        texts = greedy_texts(adapted, tokenizer, [prompts[i] for i in indices], longest)
        for index, text in zip(indices, texts, strict=True):
            right[index] = text.strip() == rows[index].answer.strip()
    return right
