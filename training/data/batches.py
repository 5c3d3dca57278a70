"""Batches of tokens from rows, which are encoded once, sorted by length and padded on the right."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.errors import DataError
from polyrex.adapters.rows import Row

from .questions import padded
from .tasks import prompt_of

logger = logging.getLogger(__name__)

IGNORED = -100
"""The target at positions that are not trained on."""


@dataclass(frozen=True, eq=False)
class Example:
    """A row as tokens; `task` is the index of its task among those trained together.

    `hidden` [T, d] is the output of the frozen layers below the adapters, if that was computed.
    `intuition` [K] routes the row, if the row is not routed by its task's router.
    """

    task: int
    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # ends with the end-of-sequence token
    hidden: Tensor | None = None
    intuition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """B rows, with the targets at the model's T output positions."""

    inputs: dict[str, Tensor]  # the model's arguments, [B, ...] each
    targets: Tensor  # [B, T] int64: the token to predict at each position, or IGNORED
    tasks: Tensor  # [B] int64
    weights: (
        Tensor  # [B, T] float32: 1 / (answer length * rows of the step), so that rows are equal
    )
    real_tokens: int  # without the padding
    intuition: Tensor | None = None  # [B, K], if rows are routed by their own prompts


def encode_answer(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The tokens of an answer that follows `Answer:`, without the end-of-sequence token."""
    return tuple(tokenizer.encode(" " + text, add_special_tokens=False))


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    rows: Sequence[Row],
    *,
    task: int = 0,
    max_tokens: int = 512,
) -> list[Example]:
    """Encode rows; a prompt that is too long loses tokens on its left, and an answer never does.

    The number of shortened prompts is logged. Raises DataError if an answer alone is too long.
    """
    examples, cut = [], 0
    for row in rows:
        answer = (*encode_answer(tokenizer, row.answer), tokenizer.eos_token_id)
        prompt = tuple(tokenizer.encode(prompt_of(instruction, row)))
        room = max_tokens - len(answer)
        if room < 1:
            raise DataError(
                f"an answer of {len(answer)} tokens leaves no room for its prompt: a row has "
                f"{max_tokens} tokens at most. It begins {row.answer[:40]!r}"
            )
        cut += len(prompt) > room
        examples.append(Example(task, prompt[-room:], answer))
    if cut:
        logger.warning(
            "%d of %d prompts lost their beginning: with the answer, a row has %d tokens at most",
            *(cut, len(rows), max_tokens),
        )
    return examples


def collate(examples: Sequence[Example], pad: int, *, rows: int = 0) -> Batch:
    """Stack examples for a decoder, padded on the right, so that causal attention needs no mask.

    `rows` is the number of rows in the step, if these examples are only a part of it.
    """
    width = max(map(len, examples))
    tokens = torch.full((len(examples), width), pad)
    targets = torch.full((len(examples), width), IGNORED)
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        # Position t predicts the token at t + 1.
        start, stop = len(example.prompt) - 1, len(example) - 1
        tokens[row, : stop + 1] = torch.tensor(example.prompt + example.answer)
        targets[row, start:stop] = torch.tensor(example.answer)
        weights[row, start:stop] = 1 / (len(example.answer) * (rows or len(examples)))
    if examples[0].hidden is None:
        inputs = {"input_ids": tokens}
    else:
        inputs = {"inputs_embeds": padded([example.hidden for example in examples])}
    return _batch(examples, inputs, targets, weights)


def collate_pairs(examples: Sequence[Example], pad: int, start: int, *, rows: int = 0) -> Batch:
    """Stack examples for a model whose encoder reads prompts and whose decoder produces answers.

    `start` is the decoder's start token; `rows` as in `collate`.
    """
    prompts = [torch.tensor(example.prompt) for example in examples]
    answers = [torch.tensor(example.answer) for example in examples]
    tokens = pad_sequence(prompts, batch_first=True, padding_value=pad)
    targets = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
    previous = F.pad(targets[:, :-1], (1, 0), value=start)
    lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    inputs = {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1]) < lengths).long(),
        "decoder_input_ids": previous.masked_fill(previous == IGNORED, pad),
    }
    counts = torch.tensor([len(answer) for answer in answers]).unsqueeze(1)
    weights = (targets != IGNORED) / (counts * (rows or len(examples)))
    return _batch(examples, inputs, targets, weights)


def _batch(
    examples: Sequence[Example], inputs: dict[str, Tensor], targets: Tensor, weights: Tensor
) -> Batch:
    tasks = torch.tensor([example.task for example in examples])
    own = [example.intuition for example in examples if example.intuition is not None]
    intuition = torch.stack(own) if own else None
    return Batch(inputs, targets, tasks, weights, sum(map(len, examples)), intuition)


def batch_indices(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches as indices: shuffled, then sorted by length within pools of 16 batches.

    Depends on nothing but the arguments, so that a resumed run sees the rows of an uninterrupted
    one.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    batches = []
    for start in range(0, len(order), size * 16):
        pool = sorted(order[start : start + size * 16], key=lambda i: lengths[i])
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, of at most about `batch_tokens` each with similar lengths together,
    longest first."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
