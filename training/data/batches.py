"""Batches of tokens from rows, which are encoded once, sorted by length and padded on the right."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from polyrex.adapters.errors import DataError
from polyrex.adapters.model.devices import send
from polyrex.adapters.rows import Row

from .questions import padded
from .tasks import prompt_of

logger = logging.getLogger(__name__)


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
    """B rows, and the n positions in them at which a token of an answer is predicted.

    What depends on values, such as which tasks occur, is worked out here on the host: a card could
    not do it without the host waiting for the result.
    """

    inputs: dict[str, Tensor]  # the model's arguments, [B, ...] each
    positions: Tensor  # [n] int64, among the B * T positions of the model's output, row by row
    targets: Tensor  # [n] int64: the token to predict at each
    weights: Tensor  # [n] float32: 1 / (answer length * rows of the step), so that rows are equal
    tasks: Tensor  # [D] int64: the distinct tasks
    rows: Tensor  # [B] int64: the number of each row's task among the D
    intuition: Tensor | None = None  # [B, K], if rows are routed by their own prompts

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return Batch(
            {name: send(each, device) for name, each in self.inputs.items()},
            positions=send(self.positions, device),
            targets=send(self.targets, device),
            weights=send(self.weights, device),
            tasks=send(self.tasks, device),
            rows=send(self.rows, device),
            intuition=None if self.intuition is None else send(self.intuition, device),
        )


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
    # Position t predicts the token at t + 1.
    starts = [width * row + len(each.prompt) - 1 for row, each in enumerate(examples)]
    if examples[0].hidden is None:
        tokens = [torch.tensor(each.prompt + each.answer) for each in examples]
        inputs = {"input_ids": pad_sequence(tokens, batch_first=True, padding_value=pad)}
    else:
        inputs = {"inputs_embeds": padded([example.hidden for example in examples])}
    return _batch(examples, inputs, starts, rows)


def collate_pairs(examples: Sequence[Example], pad: int, start: int, *, rows: int = 0) -> Batch:
    """Stack examples for a model whose encoder reads prompts and whose decoder produces answers.

    `start` is the decoder's start token; `rows` as in `collate`.
    """
    prompts = [torch.tensor(example.prompt) for example in examples]
    previous = [torch.tensor((start, *example.answer[:-1])) for example in examples]
    tokens = pad_sequence(prompts, batch_first=True, padding_value=pad)
    answers = pad_sequence(previous, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(prompt) for prompt in prompts]).unsqueeze(1)
    inputs = {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1]) < lengths).long(),
        "decoder_input_ids": answers,
    }
    starts = [answers.shape[1] * row for row in range(len(examples))]
    return _batch(examples, inputs, starts, rows)


def _batch(
    examples: Sequence[Example], inputs: dict[str, Tensor], starts: Sequence[int], rows: int
) -> Batch:
    """`starts` are the positions that predict the first token of each answer."""
    answers = [example.answer for example in examples]
    spans = [range(n, n + len(each)) for n, each in zip(starts, answers, strict=True)]
    weights = [
        torch.full((len(each),), 1 / (len(each) * (rows or len(answers)))) for each in answers
    ]
    tasks = sorted({example.task for example in examples})
    places = {task: place for place, task in enumerate(tasks)}
    own = [example.intuition for example in examples if example.intuition is not None]
    return Batch(
        inputs,
        positions=torch.tensor([position for span in spans for position in span]),
        targets=torch.tensor([token for answer in answers for token in answer]),
        weights=torch.cat(weights),
        tasks=torch.tensor(tasks),
        rows=torch.tensor([places[example.task] for example in examples]),
        intuition=torch.stack(own) if own else None,
    )


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
