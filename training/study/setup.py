"""What the cells of the comparison study share: rows as tokens, caches, models, scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.base_model import load_base, load_tokenizer, resolve_base
from polyrex.adapters.model.intuition import Intuition
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.training.adapt import few_shot_rows
from polyrex.training.data.batches import Example, encode_answer, encode_rows
from polyrex.training.data.questions import Question
from polyrex.training.data.tasks import Row, Split, Task, load_tasks, prompt_of
from polyrex.training.evaluation.evaluate import best_option, routed, score_questions
from polyrex.training.intuition.cluster import Embeddings, cluster
from polyrex.training.model.frozen import LowerLayers, cut
from polyrex.training.model.multi_task import MultiTaskModel
from polyrex.training.train import use_eager_attention

from .variants import StudyConfig, Variant

VALID_ROWS = 20
"""Rows of each task's valid split that the search for learning rates looks at; twice as many where
it looks at one task at a time."""


@dataclass(frozen=True)
class Bench:
    """The tasks, a tokenizer, and a base model whose lower layers' work is kept on disk."""

    config: StudyConfig
    held_in: list[Task]
    held_out: list[Task]
    tokenizer: PreTrainedTokenizerBase
    base: Any
    lower: LowerLayers

    @classmethod
    def open(cls, config: StudyConfig) -> Bench:
        """Load tasks and model; raises DataError where the data folder lacks a task."""
        held_in = load_tasks(config.data, role="held_in")
        held_out = load_tasks(config.data, config.held_out)
        path = resolve_base(config.base)
        base = load_base(path, getattr(torch, config.dtype))
        use_eager_attention(base)
        lower = LowerLayers(base, config.lower_layers, config.work / "hidden")
        return cls(config, held_in, held_out, load_tokenizer(path), base, lower)

    @cached_property
    def embeddings(self) -> Embeddings:
        """Of prompts, for T-REX's intuition."""
        return Embeddings(SentenceEncoder(), self.config.work / "embeddings")

    def fill_caches(self) -> None:
        """Compute what is kept of every text, before several processes want it."""
        for task in self.held_in:
            self._embedded(task, "train", task.rows["train"])
        self.examples("train")
        self.examples("valid")
        for task in self.held_in + self.held_out:
            self.questions(task)
            self._embedded(task, "test", self._test_rows(task))
        for task in self.held_out:
            self.valid(task)
            for seed in self.config.seeds:
                self.few_shot(task, seed)

    def fresh(self, variant: Variant, seed: int = 0) -> MultiTaskModel:
        """A variant with fresh adapters on the upper layers; the bench's base is used up."""
        targets = find_targets(self.base, self.config.targets)
        intuition = self._cluster(variant, seed) if variant.spec.intuition else None
        adapted = attach(self.base, variant.spec, targets, seed=seed, intuition=intuition)
        cut(self.base, self.config.lower_layers)
        return MultiTaskModel(adapted, len(self.held_in), seed=seed)

    def load(self, inventory: Inventory) -> AdaptedModel:
        """A trained inventory on the upper layers; the bench's base is used up."""
        adapted = load_experts(inventory, self.base)
        cut(self.base, self.config.lower_layers)
        return adapted

    def _cluster(self, variant: Variant, seed: int) -> Intuition:
        texts = [self._embedded(task, "train", task.rows["train"]) for task in self.held_in]
        return cluster(self.embeddings.encoder, torch.cat(texts), variant.spec, seed=seed)

    def _embedded(self, task: Task, name: str, rows: Sequence[Row]) -> Tensor:
        prompts = [prompt_of(task.instruction, row) for row in rows]
        return self.embeddings.of(f"{task.name}-{name}", prompts)

    def examples(self, split: Split, intuition: Intuition | None = None) -> list[Example]:
        """The rows of all held_in tasks, each with its prompt's intuition where there is one."""
        found: list[Example] = []
        for index, task in enumerate(self.held_in):
            rows = task.rows[split][: None if split == "train" else VALID_ROWS]
            encoded = encode_rows(self.tokenizer, task.instruction, rows, task=index)
            known = self.lower.of_examples(f"{task.name}-{split}", encoded)
            if intuition is not None:
                own = intuition.of(self._embedded(task, split, rows))
                known = [replace(e, intuition=c) for e, c in zip(known, own, strict=True)]
            found += known
        return found

    def few_shot(self, task: Task, seed: int) -> list[Example]:
        """The rows that a new task is adapted from."""
        rows = few_shot_rows(task.rows["train"], self.config.rows, seed)
        encoded = encode_rows(self.tokenizer, task.instruction, rows)
        return self.lower.of_examples(f"{task.name}-{len(rows)}", encoded)

    def valid(self, task: Task) -> list[Example]:
        """Rows of a new task that adapting to it does not see."""
        rows = task.rows["valid"][: 2 * VALID_ROWS]
        encoded = encode_rows(self.tokenizer, task.instruction, rows)
        return self.lower.of_examples(f"{task.name}-valid", encoded)

    def mean_intuition(self, intuition: Intuition, task: Task, seed: int | None) -> Tensor:
        """A task's router [1, K]: the mean intuition of its train rows, or of those of a seed."""
        rows: Sequence[Row] = task.rows["train"]
        if seed is not None:
            rows = few_shot_rows(rows, self.config.rows, seed)
        embedded = self._embedded(task, "train" if seed is None else str(len(rows)), rows)
        return intuition.of(embedded).mean(0, keepdim=True)

    def _test_rows(self, task: Task) -> Sequence[Row]:
        return task.rows["test"][: self.config.test_rows]

    def questions(self, task: Task, intuition: Intuition | None = None) -> list[Question]:
        """The test rows, each with its prompt's intuition where there is one.

        Without options, the answer itself is one, with what ends it.
        """
        found = []
        for row in self._test_rows(task):
            prompt = tuple(self.tokenizer.encode(prompt_of(task.instruction, row)))
            options = tuple(encode_answer(self.tokenizer, o) for o in row.options or ())
            end = (self.tokenizer.eos_token_id,)
            answer = (encode_answer(self.tokenizer, row.answer) + end,)
            found.append(Question(prompt, answer if task.metric == "exact_match" else options))
        known = self.lower.of_questions(f"{task.name}-test", found)
        if intuition is None:
            return known
        own = intuition.of(self._embedded(task, "test", self._test_rows(task)))
        return [replace(q, intuition=c) for q, c in zip(known, own, strict=True)]

    def right(
        self,
        adapted: AdaptedModel,
        task: Task,
        questions: Sequence[Question],
        logits: Tensor | None,
    ) -> list[bool]:
        """Which test rows come out right under a router's logits [groups, R]."""
        with routed(adapted, logits):
            found = self.answers(adapted, task, questions)
        return [right for _, right in found]

    def answers(
        self, adapted: AdaptedModel, task: Task, questions: Sequence[Question]
    ) -> list[tuple[int, bool]]:
        """Which option each test row is given under the routing set, and whether that is right.

        For exact match, greedy decoding must give the answer's own tokens: the same text in other
        tokens counts as wrong, which lets one pass do instead of one a token. The only option is
        then the answer, and -1 any other text.
        """
        newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1]
        stops = (self.tokenizer.eos_token_id, newline)
        found = score_questions(adapted, questions, stops=stops)
        if task.metric == "exact_match":
            return [(0 if scores[0].greedy else -1, scores[0].greedy) for scores in found]
        chosen = [best_option(scores) for scores in found]
        return [
            (option, (row.options or ())[option] == row.answer)
            for row, option in zip(self._test_rows(task), chosen, strict=True)
        ]
