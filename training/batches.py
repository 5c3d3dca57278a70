"""From rows to token batches: encoded once, sorted by length, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import Row, prompt_of

IGNORED = -100
"""The label of positions that are not trained on."""


@dataclass(frozen=True)
class Example:
    """A row as tokens; `task` is the index of its task among those trained together."""

    task: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # ends with the end-of-sequence token

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens."""

    tokens: Tensor  # [B, T] int64, padded on the right
    labels: Tensor  # [B, T] int64, IGNORED outside the answers; labels[t] is the token at t
    tasks: Tensor  # [B] int64
    weights: Tensor  # [B, T] float32: 1 / (answer length * B), so that every row counts the same
    real_tokens: int  # without the padding


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of an answer as it follows `Answer:`, without the end-of-sequence token."""
    return tuple(tokenizer.encode(" " + text, add_special_tokens=False))


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    rows: Sequence[Row],
    *,
    task: int = 0,
    max_tokens: int = 512,
) -> list[Example]:
    """Encode rows; a prompt that does not fit loses tokens on its left, never its answer."""
    examples = []
    for row in rows:
        answer = (*encode_answer(tokenizer, row.answer), tokenizer.eos_token_id)
        prompt = tuple(tokenizer.encode(prompt_of(instruction, row)))
        examples.append(Example(task, prompt[-(max_tokens - len(answer)) :], answer))
    return examples


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Stack examples, padded on the right: with causal attention no mask is needed then."""
    width = max(map(len, examples))
    tokens = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), IGNORED)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        start, stop = len(example.prompt), len(example)
        tokens[row, :stop] = torch.tensor(example.prompt + example.answer)
        labels[row, start:stop] = tokens[row, start:stop]
        weights[row, start:stop] = 1 / (len(example.answer) * len(examples))
    tasks = torch.tensor([example.task for example in examples])
    return Batch(tokens, labels, tasks, weights, sum(map(len, examples)))


def batch_indices(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches as indices: shuffled, then sorted by length within pools of 16 batches.

    A function of its arguments alone, so that a resumed run sees the rows that it would have seen.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), size * 16):
        pool = sorted(order[start : start + size * 16], key=lambda i: lengths[i])
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]
