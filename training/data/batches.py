"""From rows to token batches: encoded once, sorted by length, padded on the right."""

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

from .questions import padded
from .tasks import Row, prompt_of

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of positions that are not trained on."""


@dataclass(frozen=True, eq=False)
class Example:
    """A row as tokens; `task` is the index of its task among those trained together.

    `hidden` [T, d] is what the frozen layers below the adapters make of it, where it is known.
    `intuition` [K] routes the row, where it is not routed as its task is.
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
    """B rows, and what the model shall say at each of its T output positions."""

    inputs: dict[str, Tensor]  # what the model reads, [B, ...] each
    targets: Tensor  # [B, T] int64: the token to be predicted there, or IGNORED
    tasks: Tensor  # [B] int64
    weights: Tensor  # [B, T] float32: 1 / (answer length * rows a step): every row counts the same
    real_tokens: int  # without the padding
    intuition: Tensor | None = None  # [B, K], where rows are routed one by one


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
    """Encode rows; a prompt that does not fit loses tokens on its left, never its answer.

    How many did is logged. Raises DataError where an answer alone does not fit.
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
    """Stack examples for a decoder, padded on the right: with causal attention no mask is needed.

    `rows` of a step share its loss: as many as there are examples, unless these are a part of them.
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
    """Stack examples for an encoder, which reads prompts, and a decoder, which says answers.

    `start` is the token that the decoder begins with; `rows` as in `collate`.
    """
    prompts = [torch.tensor(example.prompt) for example in examples]
    answers = [torch.tensor(example.answer) for example in examples]
    tokens = pad_sequence(prompts, batch_first=True, padding_value=pad)
    targets = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
    said = F.pad(targets[:, :-1], (1, 0), value=start)
    lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    inputs = {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1]) < lengths).long(),
        "decoder_input_ids": said.masked_fill(said == IGNORED, pad),
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


def by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of about `batch_tokens`, longest first, alike lengths together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
