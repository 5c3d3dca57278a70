"""The frozen layers below the first adapter, whose output for a text is computed only once.

If only the upper part of a model has adapters, everything below is the same in every step, for
every method and every seed. `LowerLayers` computes it once and keeps it on disk; `cut` removes
those layers from the model, which then starts from their hidden states.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save
from torch import Tensor, nn

from polyrex.adapters.files.tensor_file import write_atomic
from polyrex.adapters.model.attach import AdaptedModel
from polyrex.adapters.model.base_model import identify
from polyrex.training.data.batches import Example, by_length
from polyrex.training.data.questions import Question, model_inputs


def question_of(example: Example) -> Question:
    """An example as a question with one option, its answer."""
    return Question(example.prompt, (example.answer,))


class LowerLayers:
    """The first `layers` decoder layers of a base model, and a folder of their outputs for texts.

    Decoder layers are `base.base_model.layers`, as in Llama and its many relatives.
    """

    def __init__(self, base: nn.Module, layers: int, folder: Path) -> None:
        self._base = base
        self._layers = layers
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of_questions(self, name: str, questions: Sequence[Question]) -> list[Question]:
        """The questions with their hidden states; the name of their file begins with `name`."""
        found = self._hidden(name, questions)
        return [replace(q, hidden=hidden) for q, hidden in zip(questions, found, strict=True)]

    def of_examples(self, name: str, examples: Sequence[Example]) -> list[Example]:
        """The examples with their hidden states; `name` as in `of_questions`."""
        found = self._hidden(name, [question_of(example) for example in examples])
        return [replace(e, hidden=hidden) for e, hidden in zip(examples, found, strict=True)]

    def _hidden(self, name: str, questions: Sequence[Question]) -> Sequence[Tensor]:
        path = self._folder / f"{name}-{self._key(questions)}.safetensors"
        if not path.exists():
            made = hidden_below(self._base, self._layers, questions, title=name)
            write_atomic(path, save({"hidden": torch.cat(made).cpu()}))
        # The file is mapped into memory, which all processes that read it share.
        return torch.split(load_file(path)["hidden"], [len(question) for question in questions])

    def _key(self, questions: Sequence[Question]) -> str:
        base: Any = self._base
        content = [
            asdict(identify(base)),
            str(base.dtype),
            self._layers,
            [[q.prompt, q.options] for q in questions],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@torch.no_grad()
def hidden_below(
    base: nn.Module, layers: int, questions: Sequence[Question], *, title: str | None = None
) -> list[Tensor]:
    """The output of the first `layers` decoder layers for each question, [T, d], with the adapters
    that the layers add at present. With a title, a progress bar is shown.
    """
    model: Any = base
    assert len(model.base_model.layers) == model.config.num_hidden_layers, "the model was cut"
    caught: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    found = [torch.empty(0)] * len(questions)
    batches = list(by_length([len(q) for q in questions], batch_tokens=4096))
    handle = model.base_model.layers[layers].register_forward_pre_hook(stop)
    try:
        for indices in track(batches, f"lower layers: {title}", disable=title is None):
            batch = [questions[i] for i in indices]
            with suppress(_Reached):
                model.base_model(**model_inputs(batch, model.dtype, model.device))
            for index, hidden in zip(indices, caught.pop(), strict=True):
                found[index] = hidden[: len(questions[index])].clone()
    finally:
        handle.remove()
    return found


class _Reached(Exception):
    """The forward pass has reached the first layer that is not needed."""


def cut(base: nn.Module, layers: int) -> None:
    """Remove the first `layers` decoder layers from a model, after its adapters were attached.

    From then on, the model takes hidden states (`inputs_embeds`) instead of tokens.
    """
    model: Any = base.base_model
    model.layers = model.layers[layers:]


@contextmanager
def upper_alone(
    adapted: AdaptedModel, layers: int, examples: Sequence[Example], logits: Tensor
) -> Iterator[list[Example]]:
    """Within this context, the model starts above its first `layers` decoder layers, and the
    examples have the outputs of those layers, adapted by a router's logits [groups, R].

    Only the routing of modules above may be trained then: anything else would change the outputs.
    """
    base: Any = adapted.model
    whole = base.base_model.layers
    with adapted.routed(logits):
        found = hidden_below(base, layers, [question_of(example) for example in examples])
    cut(base, layers)
    try:
        yield [replace(e, hidden=hidden) for e, hidden in zip(examples, found, strict=True)]
    finally:
        base.base_model.layers = whole
