"""Scoring a task: rank classification and exact match."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.attach import AdaptedModel
from polyrex.kernels.routing import StepRouting

from .batches import encode_answer
from .data import Metric, Row, Split, Task, prompt_of


@dataclass(frozen=True)
class Score:
    """A task's score on one split, a share of `rows` that came out right."""

    metric: Metric
    rows: int
    value: float

    @property
    def standard_error(self) -> float:
        """Of a share of independent rows."""
        return math.sqrt(self.value * (1 - self.value) / max(1, self.rows))


@contextmanager
def routed(adapted: AdaptedModel, logits: Tensor | None) -> Iterator[None]:
    """Within it, every forward pass of the model is routed by `logits` [groups, R]; None: the base.

    A hook reads each pass's number of tokens, so that `generate` can be used as it is. All tokens
    are one run, for which the layers compose the adapter once.
    """
    if logits is None:
        adapted.context.step = None
        yield
        return
    weights = adapted.route(logits.detach()).unsqueeze(0)  # [1, M, W]
    base: Any = adapted.model

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"].numel()
        rows = torch.zeros(tokens, dtype=torch.int64, device=weights.device)
        adapted.context.step = StepRouting(weights, rows, base.dtype, run=tokens)

    handle = base.base_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        adapted.context.step = None


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

    rank_classification_accuracy: the option with the highest mean token log-probability after the
    prompt is the answer. exact_match: greedy text up to the first newline, stripped.
    """
    rows = task.rows[split]
    prompts = [tokenizer.encode(prompt_of(task.instruction, row)) for row in rows]
    judge = _rank if task.metric == "rank_classification_accuracy" else _match
    with routed(adapted, logits):
        right = judge(adapted, tokenizer, rows, prompts, batch_tokens)
    return Score(task.metric, len(rows), sum(right) / max(1, len(rows)))


@dataclass(frozen=True)
class _Tree:
    """A prompt and all its options in one sequence: the prompt is encoded once for all of them."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    branch: tuple[int, ...]  # 0 for the prompt, 1.. for the option that a token belongs to


def _tree(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> _Tree:
    tokens, positions = list(prompt), list(range(len(prompt)))
    branch = [0] * len(prompt)
    for number, option in enumerate(options, start=1):
        tokens += option
        positions += range(len(prompt), len(prompt) + len(option))
        branch += [number] * len(option)
    return _Tree(tuple(tokens), tuple(positions), tuple(branch))


def tree_mask(branch: Tensor) -> Tensor:
    """[B, T] branches (-1: padding) -> [B, 1, T, T] bool: who may look at whom.

    A token sees what came before it in the prompt and in its own option, and itself.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    seen = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    return (causal & seen)[:, None]


def option_scores(
    adapted: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """For each prompt, the mean token log-probability of each of its options.

    Under the routing that is set; tokens throughout; no option may be empty.
    """
    trees = [_tree(prompt, choices) for prompt, choices in zip(prompts, options, strict=True)]
    width = max(len(tree.tokens) for tree in trees)
    tokens = torch.zeros(len(trees), width, dtype=torch.int64)
    positions, branch = tokens.clone(), tokens - 1
    for row, tree in enumerate(trees):
        count = len(tree.tokens)
        tokens[row, :count] = torch.tensor(tree.tokens)
        positions[row, :count] = torch.tensor(tree.positions)
        branch[row, :count] = torch.tensor(tree.branch)
    base: Any = adapted.model
    hidden = base.base_model(
        input_ids=tokens, position_ids=positions, attention_mask=tree_mask(branch), use_cache=False
    ).last_hidden_state
    head = base.get_output_embeddings()
    scores = []
    for row, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
        # The last token of the prompt predicts the first token of every option.
        sources: list[int] = []
        targets: list[int] = []
        start = len(prompt)
        for choice in choices:
            sources += [len(prompt) - 1, *range(start, start + len(choice) - 1)]
            targets += choice
            start += len(choice)
        logprobs = head(hidden[row, sources]).float().log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(targets).unsqueeze(1)).squeeze(1)
        scores.append([p.mean().item() for p in picked.split([len(c) for c in choices])])
    return scores


def _rank(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    prompts: Sequence[Sequence[int]],
    batch_tokens: int,
) -> list[bool]:
    options = [[encode_answer(tokenizer, o) for o in row.options or ()] for row in rows]
    lengths = [len(p) + sum(map(len, o)) for p, o in zip(prompts, options, strict=True)]
    right = [False] * len(rows)
    for indices in _by_length(lengths, batch_tokens):
        found = option_scores(adapted, [prompts[i] for i in indices], [options[i] for i in indices])
        for index, scores in zip(indices, found, strict=True):
            best = max(range(len(scores)), key=scores.__getitem__)
            right[index] = (rows[index].options or ())[best] == rows[index].answer
    return right


def greedy_texts(
    adapted: AdaptedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
) -> list[str]:
    """The greedy continuation of each prompt, up to the first newline, under the routing set."""
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width), tokenizer.eos_token_id)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):  # on the left, so that all prompts end together
        tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    base: Any = adapted.model
    # The last positions of a padded batch are strided, for which torch would copy the head's weight
    # once a row, gigabytes in all.
    handle = base.get_output_embeddings().register_forward_pre_hook(
        lambda _, args: (args[0].contiguous(),)
    )
    try:
        out = base.generate(
            input_ids=tokens,
            attention_mask=mask,
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
    # No text longer than the longest answer can match one.
    longest = max(len(encode_answer(tokenizer, row.answer)) for row in rows) + 1
    right = [False] * len(rows)
    for indices in _by_length([len(p) + longest for p in prompts], batch_tokens):
        texts = greedy_texts(adapted, tokenizer, [prompts[i] for i in indices], longest)
        for index, text in zip(indices, texts, strict=True):
            right[index] = text.strip() == rows[index].answer.strip()
    return right


def _by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of about `batch_tokens`, longest first, alike lengths together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
