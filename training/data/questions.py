"""Prompts with the options that may follow them, each as one sequence of tokens.

The options come one after another behind their prompt and cannot see each other, so that the prompt
is computed only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from polyrex.adapters.model.devices import send


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt and its options, as tokens; no option is empty.

    `hidden` [T, d] is the output of the frozen layers below the adapters, if that was computed.
    `intuition` [K] is that of the prompt, if the prompt routes the question.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    hidden: Tensor | None = None
    intuition: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.options))

    @cached_property
    def tokens(self) -> list[int]:
        """The prompt's tokens, then those of one option after another."""
        return [*self.prompt, *(token for option in self.options for token in option)]

    @cached_property
    def positions(self) -> list[int]:
        """The position of each token, where every option starts right behind the prompt."""
        start = len(self.prompt)
        behind = (p for option in self.options for p in range(start, start + len(option)))
        return [*range(start), *behind]

    @cached_property
    def branch(self) -> list[int]:
        """For each token, 0 if it is in the prompt, or the number of its option, from 1."""
        behind = (n for n, option in enumerate(self.options, start=1) for _ in option)
        return [0] * len(self.prompt) + [*behind]

    @cached_property
    def sources(self) -> list[int]:
        """For each token of an option, the index in the sequence at which it is predicted."""
        found, start = [], len(self.prompt)
        for option in self.options:
            found += [len(self.prompt) - 1, *range(start, start + len(option) - 1)]
            start += len(option)
        return found


def branch_mask(branch: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask [B, 1, T, T] to add to attention's logits, from branches [B, T] (-1 for padding).

    A token sees itself and the tokens before it in the prompt and in its own option.
    """
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    seen = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    mask = torch.zeros(len(branch), 1, length, length, dtype=dtype, device=branch.device)
    return mask.masked_fill_(~(causal & seen)[:, None], torch.finfo(dtype).min)


def last_hidden(base: nn.Module, questions: Sequence[Question]) -> Tensor:
    """The last hidden states [B, T, d] of a batch of questions, padded on the right.

    Questions that have hidden states start from these.
    """
    model: Any = base
    inputs = model_inputs(questions, model.dtype, model.device)
    out: Tensor = model.base_model(**inputs).last_hidden_state
    return out


def model_inputs(
    questions: Sequence[Question], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The arguments of a Hugging Face decoder on a device, for a batch of questions."""
    width = max(map(len, questions))
    positions = torch.zeros(len(questions), width, dtype=torch.int64)
    tokens, branch = positions.clone(), positions - 1
    for row, question in enumerate(questions):
        count = len(question)
        tokens[row, :count] = torch.tensor(question.tokens)
        positions[row, :count] = torch.tensor(question.positions)
        branch[row, :count] = torch.tensor(question.branch)
    inputs = {
        "position_ids": send(positions, device),
        "attention_mask": branch_mask(send(branch, device), dtype),
        "use_cache": False,
    }
    if questions[0].hidden is None:
        return {"input_ids": send(tokens, device), **inputs}
    hidden = padded([question.hidden for question in questions])
    return {"inputs_embeds": send(hidden, device), **inputs}


def padded(hidden: Sequence[Tensor | None]) -> Tensor:
    """Hidden states [T, d] of a batch as [B, T, d], padded with zeros on the right."""
    return nn.utils.rnn.pad_sequence([h for h in hidden if h is not None], batch_first=True)
