"""The parts that cells of the comparison study share: encoded rows, caches, models and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.files.inventory import Inventory, load_experts
from polyrex.adapters.model.attach import AdaptedModel, attach, find_targets
from polyrex.adapters.model.devices import pick_device
from polyrex.adapters.model.intuition import Intuition
from polyrex.adapters.model.sentence_encoder import SentenceEncoder
from polyrex.adapters.rows import Row
from polyrex.training.adapt import few_shot_rows
from polyrex.training.data.batches import Example, encode_answer, encode_rows
from polyrex.training.data.questions import Question
from polyrex.training.data.tasks import Split, Task, load_tasks, prompt_of
from polyrex.training.evaluation.evaluate import best_option, score_questions
from polyrex.training.intuition.cluster import TrainPrompts, mean_intuition, routed_by_prompt
from polyrex.training.intuition.embeddings import Embeddings
from polyrex.training.model.frozen import LowerLayers, cut
from polyrex.training.model.loading import load_for_training
from polyrex.training.model.multi_task import MultiTaskModel

from .variants import StudyConfig, Variant

VALID_ROWS = 20
"""The rows of each task's valid split that the search for learning rates uses; twice as many when
it adapts to one task at a time."""


@dataclass(frozen=True)
class Bench:
    """The tasks, a tokenizer, and a base model whose lower layers' outputs are kept on disk."""

    config: StudyConfig
    held_in: list[Task]
    held_out: list[Task]
    tokenizer: PreTrainedTokenizerBase
    base: Any
    lower: LowerLayers

    @classmethod
    def open(cls, config: StudyConfig) -> Bench:
        """Load the tasks and the model; raises DataError if the data folder lacks a task."""
        held_in = load_tasks(config.data, role="held_in")
        held_out = load_tasks(config.data, config.held_out)
        device = pick_device(config.device)
        base, tokenizer = load_for_training(config.base, config.dtype, device)
        lower = LowerLayers(base, config.lower_layers, config.work / "hidden")
        return cls(config, held_in, held_out, tokenizer, base, lower)

    @cached_property
    def embeddings(self) -> Embeddings:
        """The embeddings of prompts, for T-REX's intuition."""
        return Embeddings(SentenceEncoder(), self.config.work / "embeddings")

    def fill_caches(self) -> None:
        """Fill the caches on disk, before several processes need them."""
        for task in self.held_in:
            self.embeddings.of_prompts(task, "train", task.rows["train"])
        self.examples("train")
        self.examples("valid")
        for task in self.held_in + self.held_out:
            self.questions(task)
            self.embeddings.of_prompts(task, "test", self._test_rows(task))
        for task in self.held_out:
            self.valid(task)
            for seed in self.config.seeds:
                self.few_shot(task, seed)

    def fresh(self, variant: Variant, seed: int = 0) -> MultiTaskModel:
        """Attach fresh adapters of a variant to the base, and cut off its lower layers."""
        targets = find_targets(self.base, self.config.targets)
        intuition = None
        if variant.spec.intuition:
            prompts = TrainPrompts.of(self.embeddings, self.held_in, variant.spec, seed=seed)
            intuition = prompts.intuition
        adapted = attach(self.base, variant.spec, targets, seed=seed, intuition=intuition)
        cut(self.base, self.config.lower_layers)
        return MultiTaskModel(adapted, len(self.held_in), seed=seed)

    def load(self, inventory: Inventory) -> AdaptedModel:
        """Attach a trained inventory to the base, and cut off its lower layers."""
        adapted = load_experts(inventory, self.base)
        cut(self.base, self.config.lower_layers)
        return adapted

    def examples(self, split: Split, intuition: Intuition | None = None) -> list[Example]:
        """The rows of all held_in tasks; with an intuition, each is routed by its prompt's."""
        found: list[Example] = []
        for index, task in enumerate(self.held_in):
            rows = task.rows[split][: None if split == "train" else VALID_ROWS]
            encoded = encode_rows(self.tokenizer, task.instruction, rows, task=index)
            known = self.lower.of_examples(f"{task.name}-{split}", encoded)
            if intuition is not None:
                embedded = self.embeddings.of_prompts(task, split, rows)
                known = routed_by_prompt(known, intuition.of(embedded))
            found += known
        return found

    def few_shot(self, task: Task, seed: int) -> list[Example]:
        """The train rows that a new task is adapted from."""
        rows = few_shot_rows(task.rows["train"], self.config.rows, seed)
        encoded = encode_rows(self.tokenizer, task.instruction, rows)
        return self.lower.of_examples(f"{task.name}-{len(rows)}", encoded)

    def valid(self, task: Task) -> list[Example]:
        """Rows of a new task that are not used to adapt to it."""
        rows = task.rows["valid"][: 2 * VALID_ROWS]
        encoded = encode_rows(self.tokenizer, task.instruction, rows)
        return self.lower.of_examples(f"{task.name}-valid", encoded)

    def mean_intuition(self, intuition: Intuition, task: Task, seed: int | None) -> Tensor:
        """A task's router [1, K] by the intuition: the mean over all its train prompts, or over the
        few that a seed draws."""
        rows: Sequence[Row] = task.rows["train"]
        if seed is not None:
            rows = few_shot_rows(rows, self.config.rows, seed)
        part = "train" if seed is None else str(len(rows))
        return mean_intuition(intuition, self.embeddings.of_prompts(task, part, rows))

    def _test_rows(self, task: Task) -> Sequence[Row]:
        return task.rows["test"][: self.config.test_rows]

    def questions(self, task: Task, intuition: Intuition | None = None) -> list[Question]:
        """The test rows; with an intuition, each is routed by its prompt's.

        For exact match, the only option is the answer with the end-of-sequence token.
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
        embedded = self.embeddings.of_prompts(task, "test", self._test_rows(task))
        return routed_by_prompt(known, intuition.of(embedded))

    def right(
        self,
        adapted: AdaptedModel,
        task: Task,
        questions: Sequence[Question],
        logits: Tensor | None,
    ) -> list[bool]:
        """Whether each test row is answered correctly under a router's logits [groups, R]."""
        with adapted.routed(logits):
            found = self.answers(adapted, task, questions)
        return [right for _, right in found]

    def answers(
        self, adapted: AdaptedModel, task: Task, questions: Sequence[Question]
    ) -> list[tuple[int, bool]]:
        """The option that is chosen for each test row, with the adapter that the model adds at
        present, and whether it is right.

        For exact match, greedy decoding must produce the answer's own tokens. The same text in
        other tokens counts as wrong, so that one forward pass is enough. Option 0 is then the
        answer, and -1 is any other text.
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
